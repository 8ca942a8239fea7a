"""Sealed books, pure: what a block of ledger rows is hashed to, and what the house's accounts moved in it.

| file | says |
| --- | --- |
| `leaves` | from a ledger row to its leaf |
| `merkle` | the Merkle tree of RFC 6962: roots, proofs |
| `house` | the house's side of ledger rows |
| `blocks` | a sealed block, and its hash |
| `checkpoints` | the signed head of the chain of blocks |

A stranger needs nothing of tombola to check a block: `worker/docs/books.md` has the formats of these files in prose.
"""

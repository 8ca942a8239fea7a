"""The sealed books: sealing ledger rows into blocks, proving that no sealed row has changed, and what they add up to.

| file | does |
| --- | --- |
| `rows` | reads ledger rows as leaves and sums: the server hashes them |
| `sealing` | seals the rows below the horizon |
| `head` | the row of the leader: watermarks, the tree over all blocks, the last checkpoint |
| `anchors` | the head goes outside: signed checkpoints in a folder |
| `verification` | blocks beside their rows (I9), the chain of blocks beside its anchors |
| `snapshots` | the balances of accounts at a block |
| `balance` | the trial balance |
| `exporting`, `reconciling` | beancount and CSV; a payment provider's file |
"""

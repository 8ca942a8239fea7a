"""The proof that the books balance: a file for each group of invariants, and the audits on record."""

"""The proof that the books balance, and the audits on record."""

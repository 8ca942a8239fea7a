"""The only writers of the ledger and of accounts."""

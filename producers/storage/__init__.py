"""The database: engines, column types, transactions, faults, all tables; the requests, API keys, reading the ledger."""

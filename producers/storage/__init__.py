"""The database: engines, types and transactions, all tables, and what frontends read and write of them."""

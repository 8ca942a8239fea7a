"""Everything on one machine, without a server: `tombola up`."""

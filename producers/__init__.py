"""Everything before the broker: ask for draws, read their results. Safe in a web process."""

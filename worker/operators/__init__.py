"""Who may use the console, and what operators did."""

"""Operators: the users of the console, and the record of what operators did."""

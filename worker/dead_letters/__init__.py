"""Messages that were set aside, with their causes: parked, grouped, selected, discarded."""

"""Messages that were set aside: parked with their cause, grouped, selected, discarded."""

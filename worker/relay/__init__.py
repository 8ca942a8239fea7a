"""The relay: publishes what was lost on the way, gives up what never settles, archives what is old."""

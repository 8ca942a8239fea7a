"""Replays of dead letters: the forecast, vouching, and sending again."""

"""Replaying dead letters: foretold, vouched for, sent."""

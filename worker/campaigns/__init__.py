"""Campaigns behind the broker: what they would come to, their versions and states, their stock and counters."""

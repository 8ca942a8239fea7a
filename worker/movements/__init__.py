"""Movements without a message: what operators settle at once, holds that expire, points that expire each month."""

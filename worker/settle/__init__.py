"""From a delivery to a result: the consumer, its lanes, and the transaction.

consumer ─► handler ─► lanes ─► tries ─► batch (THE transaction) ─► book
"""

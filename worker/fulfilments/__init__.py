"""What must happen outside after a draw: webhooks subscribe to events, and fulfilments are delivered to them.

    the batch ──► a row of `fulfilments` in THE transaction ──► worker.relay.fulfilling ──► HTTP POST, signed

Delivery is at-least-once, under one idempotency key and with equal bytes: a receiver that knows the key does nothing.
"""

"""Seed epochs: chains are begun and rotated, draws are bound, secrets revealed. The only writer of their tables.

What an epoch is: producers.domain.seeds. Who reads: producers.storage.seeds.
"""

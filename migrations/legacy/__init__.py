"""Legacy migration, online: old code's `asset_transactions` becomes tombola's table while old and new code write.

    expand ─► backfill ─► verify ─► contract          and from each step `rollback`, to the definition before
    adopt  ─┘ where the owner's guide was begun or completed by hand (shapes.py)

Each step reads the state of the database from information_schema, keeps its checkpoints in `legacy_migration`, and does
what is left when it is run again: a step killed at any moment ends in the same state. README.md in `migrations` has the
plan on one screen.

*backfill* builds the indexes, after its sweep over the old rows and before it catches up with new rows: with both
indexes on the table the sweep took 2.7 times as long (500,000 rows: 10.7 s, without them 4.0 s and 0.9 s to build both
afterwards). From then on new workers may start, since a unique index checks each of their keys.
"""

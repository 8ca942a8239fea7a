"""The owner's own table, online: `asset_transactions` as old code knows it becomes ours while both go on writing.

    expand ─► backfill ─► verify ─► contract          and from each of them `rollback`, to the definition before
    adopt  ─┘ where somebody has begun, by hand, or has gone through all of the owner's guide (shapes.py)

Every step reads where the database stands from information_schema, keeps its checkpoints in `legacy_migration`, and
does what is left when it is run again: killed at any moment it ends in the same state. README.md beside `migrations`
has the plan on one screen.

The indexes are built by *backfill*, between its sweep over the old rows and its catching up with new ones: with both
indexes on the table the sweep took 2.7 times as long (500,000 rows: 10.7 s, without them 4.0 s and 0.9 s for building
both afterwards). New workers are let in from then on: each of their keys meets a unique index.
"""

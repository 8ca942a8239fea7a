"""The domain that both sides of the broker share, pure: errors, keys, the contract, the draw. No I/O."""

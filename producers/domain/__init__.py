"""The words both sides share, pure: errors, keys, the contract, the draw. Nothing in here reaches outside."""

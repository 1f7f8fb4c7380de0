"""Four ways to train the same generator, side by side on the demo's data."""

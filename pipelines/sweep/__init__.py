"""Trains many experiments with `meanflow train`, several at a time, and measures them with `meanflow evaluate`."""

"""Trains many experiments with pipelines.train, several at a time, and measures them with pipelines.evaluate."""

"""Converts published checkpoints to generators."""

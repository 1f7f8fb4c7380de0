"""Published checkpoints as generators."""

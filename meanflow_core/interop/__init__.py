"""Public checkpoints: reading their files, and converting their parameters to this package's networks."""

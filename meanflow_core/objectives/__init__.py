"""Training objectives: the draws of a step and the loss."""

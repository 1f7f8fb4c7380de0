"""What training runs on Ray Train share: the loop, checkpoints, stop requests, metrics and publishing."""

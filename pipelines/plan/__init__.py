"""What a training takes, computed before it starts: operations, memory, time, cost."""

"""Errors that a command reports as one line instead of a traceback."""


class InputError(ValueError):
    """Invalid input. The message says what was wanted, what came, and what to do."""


class RunError(RuntimeError):
    """Work failed after it had started. The message says where, what has been kept, and what to do."""

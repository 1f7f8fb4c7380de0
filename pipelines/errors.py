"""Errors that a command reports as one line instead of a traceback."""


class InputError(ValueError):
    """Invalid input. The message says what was expected, what was given, and the remedy."""


class RunError(RuntimeError):
    """Work that failed after it had started. The message says where, what was kept, and the remedy."""

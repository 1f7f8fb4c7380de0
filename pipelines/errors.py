"""TODO."""

from typing import TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """The user asked for something that cannot be; the message says what was wanted, what came and what to do."""


class RunError(RuntimeError):
    """Work that was begun failed; the message says at what, what is left of it and what to do."""

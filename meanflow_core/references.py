"""References to Python objects by name, as "module:name"."""

import importlib
from typing import Any


def resolve(reference: str) -> Any:
    """The object that "module:name" refers to. Raises ValueError if there is none, or if the module fails to import."""
    module, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"cannot find {reference!r}: {error}; a reference is module:name, with the module on the Python path"
        ) from error

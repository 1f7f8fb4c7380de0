"""References to Python objects by name, as "module:name"."""

import importlib
from typing import Any


def reference_of(found: type) -> str:
    """The reference of a class, for `resolve`."""
    return f"{found.__module__}:{found.__qualname__}"


def resolve(reference: str) -> Any:
    """The object that "module:name" refers to. Raises ValueError if there is none, or if the module fails to import."""
    module, _, name = reference.partition(":")
    try:
        found = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"cannot find {reference!r}: {error}; a reference is module:name, with the module on the Python path"
        ) from error
    except Exception as error:
        raise ValueError(f"cannot import {module}: {type(error).__name__}: {error}") from error
    if not hasattr(found, name):
        raise ValueError(
            f"cannot find {reference!r}: module {module!r} has no attribute {name!r}; a reference is module:name"
        )
    return getattr(found, name)

"""Which model served last, for the replicas to come: kept in a store of names that all replicas share.

Replicas write in any order. One that took minutes to start may still have been given the model before the one that the
others serve, and says that it serves after they have said so of theirs. So an entry holds when its model was asked for,
and the newest wish is what counts. An entry is a name, never changed: two writers cannot undo each other's.
"""

import json
from typing import Protocol


class Store(Protocol):
    """Names that all replicas see and that outlive them."""

    def list_names(self, prefix: str) -> list[str]:
        """The names that begin with a prefix."""

    def add(self, name: str) -> None:
        """Adds a name, unless it is there."""

    def remove(self, name: str) -> None:
        """Removes a name, if it is there."""


class ModelMemory:
    """The models of one application that served, by when they were asked for."""

    def __init__(self, store: Store, app_name: str, first_model: str) -> None:
        """first_model: what the application was built with; an application built with another begins anew."""
        self._store = store
        self._prefix = f"served:{json.dumps([app_name, first_model])}:"

    def _entries(self) -> list[tuple[float, str, str]]:
        """(when it was asked for, model, name), the newest wish last."""
        names = self._store.list_names(self._prefix)
        return sorted((*json.loads(name.removeprefix(self._prefix)), name) for name in names)

    def recall(self) -> str | None:
        """The model that was asked for last of those that served, or None. Raises what the store raises."""
        entries = self._entries()
        return entries[-1][1] if entries else None

    def remember(self, model: str, asked_at: float) -> None:
        """Adds a model that serves. asked_at: in seconds since 1970; 0 for long ago. Raises what the store raises."""
        self._store.add(self._prefix + json.dumps([asked_at, model]))
        for _, _, name in self._entries()[:-1]:
            self._store.remove(name)

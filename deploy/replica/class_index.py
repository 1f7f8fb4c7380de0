"""Finds a generator's classes by id, WordNet id or name."""

from collections.abc import Sequence

from deploy.messages import ClassEntry


def class_entries(class_names: dict[int, str], wnids: dict[str, str], num_classes: int) -> list[ClassEntry]:
    """One entry per class id; a class without a name is named by its id."""
    return [
        ClassEntry(id=label, name=class_names.get(label, str(label)), wnid=wnids.get(str(label)))
        for label in range(num_classes)
    ]


class ClassIndex:
    """A lookup table from class names, synonyms and WordNet ids to class ids."""

    def __init__(self, entries: Sequence[ClassEntry]) -> None:
        """entries: In the order of their ids. A name with commas lists synonyms, which can be looked up one by one."""
        self.entries = list(entries)
        self._ids: dict[str, list[int]] = {}
        for entry in entries:
            names = {entry.name, *entry.name.split(",")} | ({entry.wnid} if entry.wnid else set())
            for name in {name.strip().lower() for name in names}:
                self._ids.setdefault(name, []).append(entry.id)

    def find(self, class_: int | str) -> int:
        """The id of a class given by id, "class:207", WordNet id or name.

        Raises ValueError for an unknown class, or a name that several classes share.
        """
        if isinstance(class_, str) and class_.strip().lower().startswith("class:"):
            digits = class_.partition(":")[2].strip()
            if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
                raise ValueError(f'expected "class:" and an id such as "class:0", but got {class_!r}')
            class_ = int(digits)
        if isinstance(class_, int):
            if not 0 <= class_ < len(self.entries):
                raise ValueError(f"class ids are in [0, {len(self.entries) - 1}], but got {class_}")
            return class_
        ids = self._ids.get(class_.strip().lower(), [])
        if len(ids) == 1:
            return ids[0]
        if ids:
            matches = ", ".join(f"class:{label} ({self.entries[label].name})" for label in ids)
            raise ValueError(f"class name {class_!r} is ambiguous: {matches}; give the id")
        raise ValueError(f"unknown class {class_!r}; GET /classes lists the {len(self.entries)} known ones")

"""The grid of a sweep: fields of the configuration, their values, and all combinations."""

import contextlib
import difflib
import functools
import io
import itertools
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import tyro

from meanflow_core.config import TrainingConfig
from pipelines.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A combination of values."""

    name: str
    """For files and runs: "learning_rate-0.001_seed-0"."""
    values: dict[str, str]
    """{field: value}, as text."""
    config: TrainingConfig


def expand(vary: Sequence[str], config: TrainingConfig) -> list[Variant]:
    """All combinations of "field=value,value" specifications; the last one varies fastest.

    Spaces separate the elements of a value that is a tuple: "ema_decays=0.99,0.99 0.999". Raises InputError for an unknown
    field, with near names, and for an invalid value.
    """
    values: dict[str, list[Any]] = {}
    for specification in vary:
        field, _, texts = specification.partition("=")
        field = field.strip().replace("-", "_")
        if field in values or not texts:
            raise InputError(f"--vary must be FIELD=VALUE,VALUE... with each field once, but got {', '.join(vary)}")
        values[field] = [_parse(field, text, _type_of(field, config)) for text in texts.split(",")]
    leaves = [field.rpartition(".")[2] for field in values]
    names = [leaf if leaves.count(leaf) == 1 else field for leaf, field in zip(leaves, values, strict=True)]
    variants = []
    for combination in itertools.product(*values.values()):
        labels = [_label(value) for value in combination]
        name = "_".join(f"{name}-{label}" for name, label in zip(names, labels, strict=True))
        changes = dict(zip(values, combination, strict=True))
        try:
            changed = with_fields(config, changes)
        except ValueError as error:
            raise InputError(f"--vary {name}: {error}") from error
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", name)  # names folders and MLflow's metrics
        variants.append(Variant(name=name, values=dict(zip(values, labels, strict=True)), config=changed))
    if len({variant.name for variant in variants}) < len(variants):
        raise InputError(f"the values of a field must differ, but got {', '.join(vary)}")
    return variants


def with_fields(config: T, values: Mapping[str, Any]) -> T:
    """A dataclass with other values of fields, by dotted names. Raises ValueError for values that it rejects."""
    changes: dict[str, Any] = {name: value for name, value in values.items() if "." not in name}
    for section in {name.partition(".")[0] for name in values if "." in name}:
        inner = {
            name.removeprefix(f"{section}."): value for name, value in values.items() if name.startswith(f"{section}.")
        }
        changes[section] = with_fields(getattr(config, section), inner)
    return replace(config, **changes)  # type: ignore[type-var]


def _type_of(field: str, config: TrainingConfig) -> Any:
    """The type of a field, by its dotted name."""
    known = [name for name in config.flat() if not name.endswith(".class")]
    if field not in known:
        near = [name for name in known if name.rpartition(".")[2] == field.rpartition(".")[2]]
        near = near or difflib.get_close_matches(field, known, n=3, cutoff=0.4)
        raise InputError(f"the configuration has no field {field!r}; near names: {', '.join(near) or ', '.join(known)}")
    section, _, name = field.rpartition(".")
    owner = functools.reduce(getattr, section.split(".") if section else [], config)
    return typing.get_type_hints(type(owner))[name]


def _parse(field: str, text: str, expected: Any) -> Any:
    arguments = [text.strip().capitalize()] if expected is bool else text.split()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(expected, args=arguments, console_outputs=False)
    except SystemExit as error:
        name = expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")
        raise InputError(f"--vary {field} must be of type {name}, but got {text!r}") from error


def _label(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "+".join(_label(element) for element in value)
    return f"{value:g}" if isinstance(value, float) else str(value)

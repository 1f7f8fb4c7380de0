"""Reads deploy/mlflow/compose.yaml and substitutes variables as Docker Compose does."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from tests.support.readme import REPOSITORY

MLFLOW = REPOSITORY / "deploy" / "mlflow"


def compose_file() -> dict[str, Any]:
    """The parsed file."""
    return yaml.safe_load((MLFLOW / "compose.yaml").read_text())


def filled_in(words: Iterable[str], values: Mapping[str, str]) -> list[str]:
    """Replaces $(NAME), ${NAME:-default} and ${NAME:?message} in each word by the value of NAME."""

    def value(match: re.Match) -> str:
        name, sign, rest = match.groups()
        assert values.get(name) or sign == ":-", f"{name} has no value"
        return values.get(name) or rest

    return [re.sub(r"\$[({](\w+)(?:(:[-?])([^)}]*))?[)}]", value, word) for word in words]

"""What the command lines share: logging set up once, and input errors as one line instead of a traceback."""

import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro

from meanflow_core.config import TrainingConfig
from meanflow_core.presets import PRESETS
from pipelines.errors import InputError, RunError

T = TypeVar("T")


def set_up_logging() -> None:
    """Log lines with the time on stderr; libraries speak from warnings upwards."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    # This module of Ray Train names its logger by its file, and tells every checkpoint in 800 characters.
    ray = importlib.util.find_spec("ray")  # not imported: --help must be quick
    assert ray is not None
    assert ray.origin is not None
    context = str(Path(ray.origin).parent / "train/v2/_internal/execution/context.py")
    for chatty in ("httpx", "alembic", "mlflow", "ray.data", "ray.train", context):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's `main`; an InputError becomes one line, "error: ...", and exit code 2; a RunError, code 1."""
    set_up_logging()
    try:
        main()
    except (InputError, RunError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, InputError) else 1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def command_name() -> str | None:
    """What starts the running module, as one types it; None for what was not started by `python -m`."""
    specification = sys.modules["__main__"].__spec__
    return None if specification is None else f"python -m {specification.name.removesuffix('.__main__')}"


def parse_command_line(kind: type[T], description: str | None, **options: Any) -> T:
    """The command line as a dataclass, by tyro; what the dataclass itself refuses becomes an InputError."""
    try:
        return tyro.cli(kind, description=description, **{"prog": command_name(), **options})
    except ValueError as error:
        raise InputError(str(error)) from error


def parse_preset_command_line(
    kind: type[T], arguments: list[str], module: str, description: str, begin: Callable[[TrainingConfig], T]
) -> tuple[str, T]:
    """A command line of a preset's name, then options: the name, and the dataclass by tyro.

    begin: the dataclass with a preset's configuration, which options override. Raises InputError for an unknown preset
    and for what the dataclass refuses.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        listing = "\n".join(f"    {name:8s} {(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items())
        print(
            f"usage: python -m {module} PRESET [OPTIONS]\n\n{description}\n"
            f"Presets (PRESET --help lists the options):\n{listing}"
        )
        raise SystemExit(0 if arguments else 2)
    preset = arguments[0]
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    return preset, parse_command_line(
        kind, None, args=arguments[1:], default=begin(PRESETS[preset]()), prog=f"python -m {module} {preset}"
    )

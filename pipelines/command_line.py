"""Command lines: parsing with tyro, logging, and errors as one line instead of a traceback."""

import copy
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from meanflow_core.config import RunConfig, TrainingConfig
from meanflow_core.presets import preset_config, presets_of
from pipelines.errors import InputError, RunError
from pipelines.private_interfaces import ray_train_context_logger

T = TypeVar("T")

# Fields of a preset that PRESET --help shows.
COMMON_CONFIG = ("precision", "global_batch_size", "num_steps", "seed", "checkpoint_interval_steps", "learning_rate")


def set_up_logging() -> None:
    """Logs to stderr with timestamps. Libraries log only warnings and errors."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # its import would reset the level below
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    # The last one logs 800 characters per checkpoint.
    for name in ("httpx", "alembic", "mlflow", "ray.data", "ray.train", ray_train_context_logger()):
        logging.getLogger(name).setLevel(logging.WARNING)


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's `main`. An InputError prints "error: ..." and exits with 2, a RunError with 1."""
    set_up_logging()
    try:
        main()
    except (InputError, RunError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, InputError) else 1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def program(module: str) -> str:
    """The command as the user typed it: "meanflow train", or "python -m pipelines.train"."""
    if any(Path(word).stem == "meanflow" for word in sys.orig_argv[:2]):
        return f"meanflow {module.split('.')[1].replace('_', '-')}"
    return f"python -m {module}"


def parse_command_line(job_type: type[T], description: str | None, **options: Any) -> T:
    """The command line as a dataclass, parsed by tyro. Raises InputError for values that the dataclass rejects."""
    specification = sys.modules["__main__"].__spec__  # None if the command was not started with -m
    command = None if specification is None else program(specification.name.removesuffix(".__main__"))
    try:
        return tyro.cli(job_type, description=description, **{"prog": command, **options})
    except ValueError as error:
        raise InputError(str(error)) from error


def _list_presets(presets: Mapping[str, Callable[[], Any]]) -> str:
    """The presets with the first lines of their docstrings, under the first lines of their modules'."""
    lines, module = [], None
    for name, preset in presets.items():
        if preset.__module__ != module:
            module = preset.__module__
            lines.append("\n  " + (sys.modules[module].__doc__ or "").splitlines()[0])
        lines.append(f"    {name:16s} {(preset.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)


def _with_common_help(job: Any, common: Collection[str]) -> Any:
    """A copy of a dataclass whose --help shows only the fields in `common`, at any depth."""
    hints = get_type_hints(type(job), include_extras=True)
    fields, values = [], {}
    for field in dataclasses.fields(job):
        hint, value = hints[field.name], getattr(job, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = _with_common_help(value, common)
            metadata = getattr(hint, "__metadata__", ())
            hint = Annotated[type(value), *metadata] if metadata else type(value)
        elif field.name not in common:
            hint = Annotated[hint, tyro.conf.Suppress]
        fields.append((field.name, hint, copy.copy(field)))  # make_dataclass changes it
        values[field.name] = value
    shown = dataclasses.make_dataclass(type(job).__name__, fields, bases=(type(job),), frozen=True, kw_only=True)
    return shown(**values)


def parse_preset_command_line(
    arguments: list[str],
    module: str,
    description: str,
    default_job: Callable[[Any], T],
    kind: type[RunConfig] = TrainingConfig,
    common: Collection[str] = (),
) -> tuple[str, T]:
    """Parses "PRESET [OPTIONS]" and returns the preset's name and the dataclass.

    default_job: builds the default options from the preset's configuration, which is of class `kind`.
    common: names of the fields that PRESET --help shows; PRESET --help-all shows all.
    Raises InputError for an unknown preset and for values that the dataclass rejects.
    """
    if not arguments or arguments[0] in ("-h", "--help", "--help-all"):
        listed = _list_presets(presets_of(kind))
        print(
            f"usage: {program(module)} PRESET [OPTIONS]\n\n{description}\n"
            f"Presets (PRESET --help lists the options; module:function names one of your own):\n{listed}"
        )
        raise SystemExit(0 if arguments else 2)
    preset, options = arguments[0], arguments[1:]
    try:
        config = preset_config(preset, kind)
    except ValueError as error:
        raise InputError(str(error)) from error
    job = default_job(config)
    command = f"{program(module)} {preset}"
    if "--help-all" in options:
        options = ["--help"]
    elif {"-h", "--help"} & set(options):
        print(f"The most used options; {command} --help-all lists all of them.\n", flush=True)
        job = _with_common_help(job, {*COMMON_CONFIG, *common})
    return preset, parse_command_line(type(job), None, args=options, default=job, prog=command)

"""What the command lines share: logging set up once, and input errors as one line instead of a traceback."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import ray
import tyro

from meanflow_core.config import TrainingConfig
from meanflow_core.presets import PRESETS

T = TypeVar("T")

# glibc gives large temporaries back to the system and faults them in again at every step: 3 to 10 times slower on CPUs.
FAST_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",  # the thresholds hold in the first arena alone; Ray calls workers' code from other threads
}


class InputError(ValueError):
    """The user asked for something that cannot be; the message says what was wanted, what came and what to do."""


class RunError(RuntimeError):
    """Work that was begun failed; the message says at what, what is left of it and what to do."""


def set_up_logging() -> None:
    """Log lines with the time on stderr; libraries speak from warnings upwards."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    # This module of Ray Train names its logger by its file, and tells every checkpoint in 800 characters.
    context = str(Path(ray.__file__).parent / "train/v2/_internal/execution/context.py")
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


def _quieten_worker() -> None:
    # Without a dashboard, Ray Train's placement group cleaner cannot ask about its controller, and says so every second.
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)


def start_ray(needed_cpus: int) -> None:
    """Joins the cluster that a job runs in, else starts one on this machine with at least `needed_cpus` logical CPUs.

    Logical CPUs may exceed the cores of a laptop: they schedule, they do not compute.
    """
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=True)
    else:
        # "local" and not the nearest cluster that happens to run: a laptop's job must not land in somebody's session.
        cpus = max(os.cpu_count() or 1, needed_cpus)
        environment = {"worker_process_setup_hook": _quieten_worker, "env_vars": FAST_MALLOC}
        ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=True, runtime_env=environment)


def choose_gpus(wanted: bool | None, num_processes: int = 1) -> bool:
    """Whether to compute on GPUs: as wanted; if nothing was said, where the cluster in use has them now.

    Raises InputError where a machine's own GPUs are fewer than the processes that want one each. A cluster may grow:
    there Ray waits for the machines.
    """
    available = num_gpus()
    use_gpus = available > 0 if wanted is None else wanted
    if use_gpus and "RAY_ADDRESS" not in os.environ and num_processes > available:
        raise InputError(
            f"{num_processes} processes want a GPU each, but this machine has {available} that torch can use"
        )
    return use_gpus


def num_gpus() -> int:
    """GPUs of the cluster in use; of this machine, only those that its torch can use."""
    import torch  # here, so that tasks which need none start without it, in a second instead of ten

    available = int(ray.cluster_resources().get("GPU", 0))
    return available if "RAY_ADDRESS" in os.environ else min(available, torch.cuda.device_count())

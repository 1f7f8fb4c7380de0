"""Estimates what a training takes on a number of GPUs, before any of them is rented.

    python -m pipelines.plan xl2 --gpus 32 --gpu h100 --precision tf32 --network-gbit 400 --price-per-gpu-hour 2.75

Needs no dataset and no GPU. FLOPs, parameters and memory are counted. Every rate is an assumption, printed with its value
and its source; replace it with a measurement by --teraflops, --link-gbyte, --network-gbit or --storage-gbyte. Every
number of the preset can be overridden, as in pipelines.train.
"""

import sys

from meanflow_core.presets import PRESETS
from pipelines.command_line import parse_preset_command_line, run_command
from pipelines.errors import InputError
from pipelines.plan.job import PlanJob


def parse_arguments(arguments: list[str]) -> tuple[str, PlanJob]:
    """Parses a preset's name, then options. Raises InputError for invalid ones."""
    preset, job = parse_preset_command_line(
        PlanJob, arguments, "pipelines.plan", __doc__ or "", lambda config: PlanJob(config=config)
    )
    if job.epochs is not None and job.config.num_steps != PRESETS[preset]().num_steps:
        raise InputError(f"give --epochs {job.epochs:g} or --num-steps {job.config.num_steps}, but not both")
    return preset, job


def main() -> None:
    """Runs the command."""
    preset, job = parse_arguments(sys.argv[1:])
    from pipelines.plan.run import plan  # imports torch

    print(plan(preset, job))


if __name__ == "__main__":
    run_command(main)

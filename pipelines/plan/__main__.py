"""Estimates memory, time and cost of a training run on a number of GPUs, before they are rented.

    meanflow plan xl2 --gpus 32 --gpu h100 --precision tf32 --network-gbit 400 --price-per-gpu-hour 2.75

Requires no dataset and no GPU. FLOPs, parameters and memory are counted; rates are assumed, and printed at the end of the
report. To replace them by measurements, use --teraflops, --link-gbyte, --network-gbit and --storage-gbyte. Options override
the preset's values, as in `meanflow train`.
"""

import dataclasses
import sys

from meanflow_core.presets import preset_config
from pipelines.command_line import parse_preset_command_line, run_command
from pipelines.errors import InputError
from pipelines.plan.job import PlanJob, Workload


def parse_arguments(arguments: list[str]) -> tuple[str, PlanJob]:
    """Parses a preset's name and the options after it. Raises InputError for an unknown preset or invalid options."""
    preset, job = parse_preset_command_line(
        arguments,
        "pipelines.plan",
        __doc__ or "",
        lambda config: PlanJob(workload=Workload(config=config)),
        common=(
            *(field.name for field in dataclasses.fields(PlanJob)),
            "gpu",
            "teraflops",
            "network_gbit",
            "price_per_gpu_hour",
        ),
    )
    if job.epochs is not None and job.workload.config.num_steps != preset_config(preset).num_steps:
        raise InputError(f"give --epochs {job.epochs:g} or --num-steps {job.workload.config.num_steps}, but not both")
    return preset, job


def main() -> None:
    """Runs the command."""
    preset, job = parse_arguments(sys.argv[1:])
    from pipelines.plan.run import plan  # imports torch

    print(plan(preset, job))


if __name__ == "__main__":
    run_command(main)

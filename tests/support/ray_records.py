"""Writes a run's folder as Ray Train leaves it: checkpoint folders with one file each, and Ray's record of them."""

import json
from pathlib import Path

import ray

from meanflow_core.checkpoint import FORMAT_VERSION
from pipelines.training import checkpoints


def checkpoint_name(step: int) -> str:
    """Name of a step's checkpoint folder, in the order of steps."""
    return f"checkpoint_2026-11-25_20-00-{step:02d}.123456"


def write_checkpoint(run: Path, step: int) -> None:
    """Writes a complete checkpoint folder, without adding it to Ray's record."""
    folder = run / checkpoint_name(step)
    folder.mkdir(parents=True)
    (folder / "shard-1.safetensors").write_bytes(b"12345")
    (folder / "state.json").write_text(
        json.dumps({"format_version": FORMAT_VERSION, "step": step, "files": {"shard-1.safetensors": 5}})
    )


def write_checkpoints(run: Path, steps: list[int]) -> None:
    """Writes checkpoints of these steps and Ray's record of them."""
    for step in steps:
        write_checkpoint(run, step)
    results = [
        {"version": 0, "checkpoint_dir_name": checkpoint_name(step), "metrics": {"step": step}} for step in steps
    ]
    record = {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(steps))),
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(steps),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    (run / checkpoints.CHECKPOINT_RECORD).write_text(json.dumps(record))

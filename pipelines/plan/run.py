"""Estimates the training run that a PlanJob describes."""

from dataclasses import replace

from pipelines.errors import InputError
from pipelines.latents.manifest import read_manifest
from pipelines.plan.job import PlanJob, Workload
from pipelines.plan.report import describe_estimate


def resolve_workload(job: PlanJob) -> Workload:
    """The job's workload, with the data and the length from --data and --epochs. Raises InputError for invalid values."""
    workload = job.workload
    if job.data is not None:
        manifest = read_manifest(job.data)
        workload = replace(
            workload,
            images=manifest.num_samples,
            latent_shape=manifest.latent_shape,
            classes=len(manifest.class_names),
            config=replace(workload.config, mirror=workload.config.mirror and manifest.recipe.mirrored),
        )
    if job.epochs is None:
        return workload
    if not 0 < job.epochs < float("inf"):
        raise InputError(f"epochs must be above 0 and finite, but got {job.epochs:g}")
    # A batch may span two epochs.
    num_steps = max(1, round(job.epochs * workload.images / workload.config.global_batch_size))
    return replace(workload, config=replace(workload.config, num_steps=num_steps))


def plan(preset: str, job: PlanJob) -> str:
    """Estimates the training run and returns a text report. Raises InputError for invalid input."""
    try:
        return describe_estimate(preset, resolve_workload(job), job.cluster, job.gpus)
    except ValueError as error:
        raise InputError(str(error)) from error

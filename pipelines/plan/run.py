"""Builds the workload and the cluster that a PlanJob describes, and reports the estimate."""

import json
from dataclasses import asdict

from pipelines.errors import InputError
from pipelines.latents.manifest import read_manifest
from pipelines.plan.estimate import Estimate, Workload, estimate
from pipelines.plan.hardware import GPUS, LINK_FRACTION, Cluster
from pipelines.plan.job import PlanJob
from pipelines.plan.report import assumptions, describe_estimate


def build_workload(job: PlanJob) -> Workload:
    """The training workload. Raises InputError if --data is not a latent dataset, ValueError for invalid sizes."""
    images, shape, classes, mirrored = job.images, job.latent_shape, job.classes, job.mirror
    if job.data is not None:
        manifest = read_manifest(job.data)
        images, shape, classes = manifest.num_samples, manifest.latent_shape, len(manifest.class_names)
        mirrored = mirrored and manifest.recipe.mirrored
    workload = Workload(
        config=job.config,
        num_images=images,
        latent_shape=shape,
        num_classes=classes,
        mirrored=mirrored,
        parallelism=job.parallelism,
        samples_per_pass=job.samples_per_pass,
    )
    if job.epochs is None:
        return workload
    if not 0 < job.epochs < float("inf"):
        raise InputError(f"epochs must be above 0 and finite, but got {job.epochs:g}")
    return workload.with_epochs(job.epochs)


def build_cluster(job: PlanJob) -> Cluster:
    """The cluster. Raises InputError for an unknown GPU, ValueError for invalid rates."""
    if job.gpu not in GPUS:
        raise InputError(
            f"gpu must be one of {', '.join(GPUS)}, but got {job.gpu!r}; for another GPU, choose one with as much "
            f"memory and set --teraflops and --link-gbyte"
        )
    gpu = GPUS[job.gpu]
    return Cluster(
        gpu=gpu,
        gpus_per_node=job.gpus_per_node,
        teraflops=job.teraflops,
        link_gbyte=LINK_FRACTION * gpu.link_gbyte if job.link_gbyte is None else job.link_gbyte,
        network_gbit=job.network_gbit,
        storage_gbyte=job.storage_gbyte,
        price_per_gpu_hour=job.price_per_gpu_hour,
    )


def as_json(preset: str, estimate: Estimate) -> str:
    """The estimate as JSON, in bytes and seconds, with its assumptions. Ends with a newline."""
    content = {
        "preset": preset,
        "estimate": asdict(estimate),
        "usable_bytes": estimate.cluster.gpu.usable_bytes,
        "gradient_bytes": estimate.workload.gradient_bytes,
        "latent_bytes": estimate.workload.latent_bytes,
        "memory_bytes": estimate.memory.total,
        "assumptions": [
            {"name": name, "value": value, "source": source} for name, value, source in assumptions(estimate)
        ],
    }
    return json.dumps(content, indent=2) + "\n"


def plan(preset: str, job: PlanJob) -> str:
    """Estimates the training run, writes the JSON file if requested, and returns a text report.

    Raises InputError for invalid input.
    """
    try:
        estimated = estimate(build_workload(job), build_cluster(job), job.gpus)
    except ValueError as error:
        raise InputError(str(error)) from error
    if job.json is not None:
        job.json.parent.mkdir(parents=True, exist_ok=True)
        job.json.write_text(as_json(preset, estimated))
    return describe_estimate(preset, estimated)

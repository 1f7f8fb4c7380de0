"""The calculator of scale: what a training takes on so many GPUs, before any of them is rented.

    python -m pipelines.plan xl2 --gpus 32 --gpu h100 --precision tf32 --network-gbit 400 --price-per-gpu-hour 2.75

Needs no data set and no GPU: operations, parameters and memory are counted, bytes are arithmetic, and every rate is an
assumption that is printed with its value and its source. What was measured goes in as --teraflops, --link-gbyte,
--network-gbit and --storage-gbyte. Every number of the preset can be overridden, as in pipelines.train.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from meanflow_core.config import TrainingConfig
from meanflow_core.presets import PRESETS
from pipelines.command_line import parse_preset_command_line, run_command
from pipelines.errors import InputError
from pipelines.latents.manifest import read_manifest
from pipelines.plan import scale, scale_report
from pipelines.plan.hardware import GPUS, SHARE_OF_LINK, Cluster
from pipelines.plan.scale import Workload

# ImageNet's training images; latents of Stable Diffusion's autoencoder at 256 pixels.
IMAGENET_IMAGES, IMAGENET_CLASSES, LATENTS_256 = 1_281_167, 1000, (4, 32, 32)
# Plain TCP between rented machines; those with EFA or InfiniBand have 400 (p4d) to 3,200 (p5).
NETWORK_GBIT = 100.0
# Of an object store to one node, several shards at once.
STORAGE_GBYTE = 1.0


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """What to train on which machines, and what is known of these."""

    gpus: int = 8
    """GPUs."""
    gpus_per_node: int = 8
    """GPUs of a node."""
    gpu: str = "h100"
    """Kind of GPU: h200, h100, a100, a100-40, l4."""
    teraflops: float | None = None
    """TFLOP/s that a GPU sustains over whole steps: MLflow's model_flops_per_second of a trial, over its GPUs and 10^12.
    Unless given, assumed from its peak and its memory."""
    link_gbyte: float | None = None
    """GB/s in one direction between the GPUs of a node (NVLink), as collectives reach; unless given, three quarters of
    the data sheet's."""
    network_gbit: float = NETWORK_GBIT
    """Gbit/s in one direction between a node and the others, as collectives reach."""
    storage_gbyte: float = STORAGE_GBYTE
    """GB/s between a node and the storage of latents and checkpoints."""
    price_per_gpu_hour: float | None = None
    """Price of a GPU's hour; without it no cost is shown."""
    parallelism: Literal["ddp", "fsdp2"] = "ddp"
    """As in pipelines.train."""
    rows_per_pass: int | None = None
    """Most rows that a GPU takes at once; as many as fit unless given."""
    epochs: float | None = None
    """Length of the training in epochs, in place of --num-steps."""
    data: str | None = None
    """Latent dataset to plan for, in place of the next four."""
    images: int = IMAGENET_IMAGES
    """Images of the training set."""
    latent_shape: tuple[int, int, int] = LATENTS_256
    """Channels, height and width of a latent."""
    classes: int = IMAGENET_CLASSES
    """Classes."""
    mirror: bool = True
    """Latents of mirror images too."""
    json: Path | None = None
    """File for all figures."""
    picture: Path | None = None
    """PNG to draw: days and a step's parts against GPUs."""
    config: Annotated[TrainingConfig, tyro.conf.arg(name="")]
    """The experiment."""

    def workload(self) -> Workload:
        """What is to be trained. Raises InputError where --data is no dataset, ValueError for what cannot be."""
        images, shape, classes, mirror = self.images, self.latent_shape, self.classes, self.mirror
        if self.data is not None:
            manifest = read_manifest(self.data)
            images, shape, classes = manifest.num_samples, manifest.latent_shape, len(manifest.class_names)
            mirror = mirror and manifest.recipe.mirrored
        workload = Workload(
            config=self.config,
            num_images=images,
            latent_shape=shape,
            num_classes=classes,
            mirrored=mirror,
            parallelism=self.parallelism,
            rows_per_pass=self.rows_per_pass,
        )
        if self.epochs is None:
            return workload
        if not 0 < self.epochs < float("inf"):
            raise InputError(f"epochs must be above 0 and finite, but got {self.epochs:g}")
        return scale.with_epochs(workload, self.epochs)

    def cluster(self) -> Cluster:
        """The machines. Raises InputError for an unknown GPU, ValueError for rates that are not above 0."""
        if self.gpu not in GPUS:
            raise InputError(
                f"gpu must be one of {', '.join(GPUS)}, but got {self.gpu!r}; for another, take one of as much memory and "
                f"give its --teraflops and --link-gbyte"
            )
        gpu = GPUS[self.gpu]
        return Cluster(
            gpu=gpu,
            gpus_per_node=self.gpus_per_node,
            teraflops=self.teraflops,
            link_gbyte=SHARE_OF_LINK * gpu.link_gbyte if self.link_gbyte is None else self.link_gbyte,
            network_gbit=self.network_gbit,
            storage_gbyte=self.storage_gbyte,
            price_per_gpu_hour=self.price_per_gpu_hour,
        )


def parse_arguments(arguments: list[str]) -> tuple[str, PlanJob]:
    """The command line: a preset's name, then options. Raises InputError for what cannot be."""
    preset, job = parse_preset_command_line(
        PlanJob, arguments, "pipelines.plan", __doc__ or "", lambda config: PlanJob(config=config)
    )
    if job.epochs is not None and job.config.num_steps != PRESETS[preset]().num_steps:
        raise InputError(f"give --epochs {job.epochs:g} or --num-steps {job.config.num_steps}, but not both")
    return preset, job


def plan(preset: str, job: PlanJob) -> str:
    """The text, having written what else was asked for. Raises InputError for what cannot be."""
    try:
        estimate = scale.estimate(job.workload(), job.cluster(), job.gpus)
    except ValueError as error:
        raise InputError(str(error)) from error
    assumptions = scale_report.assumptions(estimate)
    if job.json is not None:
        job.json.parent.mkdir(parents=True, exist_ok=True)
        job.json.write_text(scale_report.as_json(preset, estimate, assumptions))
    if job.picture is not None:
        job.picture.parent.mkdir(parents=True, exist_ok=True)
        scale_report.draw(preset, estimate, job.picture)
    return scale_report.text(preset, estimate, assumptions)


def main() -> None:
    """The command."""
    print(plan(*parse_arguments(sys.argv[1:])))


if __name__ == "__main__":
    run_command(main)

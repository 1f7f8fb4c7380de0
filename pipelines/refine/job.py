"""Options of a refinement."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from meanflow_core.config import RefineConfig
from pipelines.command_line import parse_preset_command_line
from pipelines.training.job import RunJob

DESCRIPTION = """Refine a one-step generator with the Frechet loss: match its images' features to those of real images.

    meanflow refine demo --model runs/demo/generator --extractors judge --references judge.npz \\
        --held-out-extractors efficientnet-lite0 --held-out-references lite0.npz --storage runs --run-name demo-refined

A refined generator has low distances in the extractors that it was trained on. Only held-out extractors show whether its
images became better, so at least one is required. `meanflow reference` makes the references.
The same command resumes the run from its last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class RefineJob(RunJob):
    """One refinement: the generator, the extractors and the workers."""

    model: str
    """Generator to refine: a folder or URI, models:/name@alias, or runs:/id/name."""
    extractors: tuple[str, ...]
    """Extractors to train on, as in `meanflow evaluate`: inception, efficientnet-lite0, the folder of a judge, ..."""
    references: tuple[str, ...]
    """A reference of `meanflow reference` for each of the extractors."""
    loss_weights: tuple[float, ...] = ()
    """Weight of each extractor in the loss. Default: 1 for all."""
    held_out_extractors: tuple[str, ...]
    """Extractors to measure along the way and never to train on."""
    held_out_references: tuple[str, ...]
    """A reference for each of the held-out extractors."""
    extractor_weights: Path | None = None
    """File of Inception's weights, as in `meanflow evaluate`."""
    data: str | None = None
    """Latent dataset, or images, of the generator's training: classes are drawn as often as they occur in it. Default: all
    classes equally often."""
    model_name: str | None = None
    """Name in MLflow's model registry. Default: that of the run."""
    config: Annotated[RefineConfig, tyro.conf.arg(name="")]
    """The configuration of the refinement."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for extractors, references in (
            ("extractors", "references"),
            ("held_out_extractors", "held_out_references"),
        ):
            names, files = getattr(self, extractors), getattr(self, references)
            if not isinstance(names, tuple):  # tyro's placeholder for what the command line must give
                continue
            if not names or len(names) != len(files):
                raise ValueError(
                    f"{extractors} and {references} need one or more extractors and a reference for each, but got "
                    f"{len(names)} and {len(files)}"
                )
        if self.loss_weights and len(self.loss_weights) != len(self.extractors):
            raise ValueError(
                f"loss_weights must be one per extractor, {len(self.extractors)}, but got {len(self.loss_weights)}"
            )
        if not all(0.0 < weight < float("inf") for weight in self.loss_weights):
            raise ValueError(f"loss_weights must be above 0 and finite, but got {self.loss_weights}")

    @property
    def registered_name(self) -> str:
        """The generator's name in MLflow's model registry."""
        return self.model_name or self.run_name


def parse_arguments(arguments: list[str]) -> tuple[str, RefineJob]:
    """Parses a preset's name and the options after it. Raises InputError for an unknown preset or invalid options."""

    def default_job(config: RefineConfig) -> RefineJob:
        required = ("model", "extractors", "references", "held_out_extractors", "held_out_references")
        missing = dict.fromkeys((*required, "storage", "run_name"), tyro.MISSING)
        return RefineJob(**missing, config=config)

    common = (
        *("model", "extractors", "references", "loss_weights", "held_out_extractors", "held_out_references", "data"),
        *("storage", "run_name", "num_workers", "samples_per_pass", "device", "dry_run"),
        *("moments_decay", "fill_steps", "measure_interval_steps"),
    )
    return parse_preset_command_line(arguments, "pipelines.refine", DESCRIPTION, default_job, RefineConfig, common)

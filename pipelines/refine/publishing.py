"""The generators of a finished refinement, with the marks of what they were trained on."""

from dataclasses import dataclass
from pathlib import Path

from ray.train import Checkpoint

from meanflow_core.autoencoder import weight_hash
from meanflow_core.checkpoint import load_average
from meanflow_core.generator import save_generator
from meanflow_core.generator_folder import write_provenance
from pipelines import storage
from pipelines.refine.inputs import Generator, Metric, open_generator
from pipelines.refine.job import RefineJob
from pipelines.tracking.registry import WEIGHTS_TAG
from pipelines.tracking.run import Run
from pipelines.training.publishing import publish_averages
from pipelines.training.record import Published


@dataclass(frozen=True, kw_only=True)
class FinishedRefinement:
    """Inputs for writing the generators of a finished refinement."""

    job: RefineJob
    preset: str
    generator: Generator
    """The generator before the refinement."""
    metrics: list[Metric]
    checkpoint: Checkpoint
    step: int


def publish_generators(finished: FinishedRefinement, run: Run) -> Published:
    """Writes and registers the generators as training does. Raises RunError if MLflow cannot register them."""
    job = finished.job
    tags = {
        "preset": finished.preset,
        "step": str(finished.step),
        "refined_from": storage.redact(job.model),
        "refined_on": ", ".join(metric.label for metric in finished.metrics if metric.weight is not None),
    }
    return publish_averages(
        job,
        job.config.ema_decays,
        lambda decay, folder: _write_generator(finished, decay, run, folder),
        run,
        name=job.registered_name,
        step=finished.step,
        tags=tags,
    )


def _write_generator(finished: FinishedRefinement, decay: float, run: Run, folder: Path) -> dict[str, str]:
    """Writes the generator of a moving average. Returns the hashes of its weights."""
    job = finished.job
    before = open_generator(job)
    pipeline = before.pipeline
    with finished.checkpoint.as_directory() as checkpoint:
        load_average(before.network, decay, Path(checkpoint))
    save_generator(pipeline, folder, portable=job.portable)
    provenance = {
        **before.provenance,
        "run_id": run.run_id,
        "tracking_uri": storage.redact(run.tracking_uri),
        "preset": finished.preset,
        "step": finished.step,
        "ema_decay": decay,
        "refined_from": storage.redact(job.model),
        "refined_from_sha256": finished.generator.weights_sha256,
        # Also those of earlier refinements: a distance once trained on stays marked.
        "refined_on": [
            *before.provenance.get("refined_on", []),
            *(metric.extractor.identity for metric in finished.metrics if metric.weight is not None),
        ],
    }
    write_provenance(folder, provenance)
    (folder / "README.md").write_text(_card(finished, before.folder, decay))
    return {WEIGHTS_TAG: weight_hash(pipeline.transformer), "vae_sha256": weight_hash(pipeline.vae)}


def _card(finished: FinishedRefinement, original: Path, decay: float) -> str:
    """The model card: that of the original, and what the refinement was trained on."""
    card = original / "README.md"
    text = card.read_text() if card.is_file() else f"# {finished.job.registered_name}\n"
    trained = ", ".join(metric.label for metric in finished.metrics if metric.weight is not None)
    held_out = ", ".join(metric.label for metric in finished.metrics if metric.weight is None)
    return f"""{text.rstrip()}

## Refined

This generator was refined with the Frechet loss (arXiv 2604.28190) from {storage.redact(finished.job.model)}, for
{finished.step:,} steps of {finished.job.config.global_batch_size:,} images; moving average with decay {decay:g}.

- **Trained on** the features of {trained}. Distances in these features measure the training, not the images: state them only
  beside others.
- **Held out**: {held_out}.
"""

"""Options of the command `meanflow before-after`."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.cluster import Device
from pipelines.evaluate.samples import Labels

DESCRIPTION = """Measure a refined generator beside the one that it was refined from.

    meanflow before-after --model runs/demo-refined/generator --extractors judge efficientnet-lite0 \\
        --references judge.npz lite0.npz --train-images images/train --held-out-images images/val --num-samples 2000 \\
        --output before-after

Distances in extractors that the refinement was trained on are marked. At least one extractor must be held out."""


@dataclass(frozen=True, kw_only=True)
class BeforeAfterJob:
    """Two generators, several extractors, one table."""

    model: str
    """The refined generator: a folder or URI, models:/name@alias, or runs:/id/name."""
    before: str | None = None
    """The generator before the refinement. Default: the location that `meanflow refine` recorded."""
    extractors: tuple[str, ...]
    """Extractors, as in `meanflow evaluate`."""
    references: tuple[str, ...] = ()
    """Reference files of `meanflow reference`, one for each extractor. Default: computed from the training images."""
    extractor_weights: Path | None = None
    """File of Inception's weights, as in `meanflow evaluate`."""
    train_images: str
    """Real images that the generator was trained on, as in `meanflow evaluate`."""
    held_out_images: str
    """Real images that it was not trained on, as in `meanflow evaluate`."""
    output: Path
    """Folder for the table, the picture, and the report of each evaluation."""
    num_samples: int = 10_000
    """Samples of each generator."""
    num_precision_recall: int = 10_000
    """Images of each set for precision, recall and nearest images, as in `meanflow evaluate`. Fewer save time."""
    steps: tuple[int, ...] = (1,)
    """Numbers of sampling steps."""
    labels: Labels = "random"
    """Class labels, as in `meanflow evaluate`."""
    batch_size: int = 50
    """Images per forward."""
    num_workers: int | None = None
    """Worker processes. Default: one per GPU, or one per CPU on a machine without GPUs."""
    device: Device = "auto"
    """auto uses GPUs if the cluster has any."""
    tracking_uri: str | None = None
    """MLflow address, for models:/ and runs:/. Default: MLFLOW_TRACKING_URI. Nothing is logged there."""

    def __post_init__(self) -> None:
        if not self.extractors:
            raise ValueError("extractors must be one or more, but got none")
        if self.references and len(self.references) != len(self.extractors):
            raise ValueError(
                f"references must be as many as extractors, {len(self.extractors)}, but got {len(self.references)}"
            )

"""The configuration of a refinement: post-training by the Frechet loss."""

from dataclasses import dataclass
from typing import Literal

from meanflow_core.config.rules import (
    IN_0_TO_BELOW_1,
    NOT_NEGATIVE_INTEGER,
    POSITIVE_INTEGER,
    check,
    one_of,
    require,
)
from meanflow_core.config.training import RunConfig


@dataclass(frozen=True, kw_only=True)
class RefineConfig(RunConfig):
    """The full configuration of a refinement. The network is the generator's; its guidance is the generator's default."""

    num_inference_steps: int = 1
    """Sampling steps of the images whose features are matched. The gradient flows through all of them."""
    moments_decay: float = 0.999
    """Decay b of the moving moments, per step. The current batch has the share 1 - b in the moments of the loss."""
    fill_steps: int = 50
    """Number of first steps that only measure: the moving moments start as the mean over their images. The learning rate's
    warm-up counts them, too."""
    frozen_precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the decoder and of the extractors. bfloat16: autocast. Moments are always float64."""
    decoder_checkpointing: bool = False
    """Recompute the decoder's activations in backward, which saves most of a step's memory."""
    measure_interval_steps: int = 1000
    """Steps between two measurements of every extractor's distance, trained on or held out, from samples of the first moving
    average."""
    measure_samples: int = 10_000
    """Number of samples of a measurement."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "", POSITIVE_INTEGER, "num_inference_steps", "measure_interval_steps", "measure_samples")
        check(self, "", IN_0_TO_BELOW_1, "moments_decay")
        check(self, "", NOT_NEGATIVE_INTEGER, "fill_steps")
        check(self, "", one_of("float32", "bfloat16"), "frozen_precision")
        require(
            self.fill_steps < self.num_steps,
            f"fill_steps must be below num_steps {self.num_steps}, which includes them, but got {self.fill_steps}",
        )
        require(
            self.fill_steps > 0 or self.moments_decay == 0.0,
            f"moving moments (moments_decay {self.moments_decay:g}) need at least one of fill_steps, but got 0",
        )

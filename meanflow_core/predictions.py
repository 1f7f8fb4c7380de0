"""What a network predicts, which decides how a generator samples with it; see `pipeline.MeanFlowPipeline`."""

from typing import Literal, get_args

Prediction = Literal["average_velocity", "velocity", "consistency", "epsilon"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def needs_many_steps(prediction: str) -> bool:
    """Whether sampling follows the velocity or the noise in many small steps.

    Such a generator can be guided at sampling time, by the predictions for the class and for the null class at each step.
    """
    return prediction in ("velocity", "epsilon")

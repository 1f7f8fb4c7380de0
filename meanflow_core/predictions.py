"""What a network predicts, which decides how a generator samples with it; see `pipeline.MeanFlowPipeline`."""

from typing import Literal, get_args

Prediction = Literal["average_velocity", "velocity", "consistency", "epsilon"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def needs_many_steps(prediction: str) -> bool:
    """Whether images take many steps, because the network predicts the direction at one time only.

    Such a network can be guided at sampling time: it knows the null class at every time.
    """
    return prediction in ("velocity", "epsilon")

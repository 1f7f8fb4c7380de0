"""What a MeanFlow training step costs beside a flow-matching step of the same network: the demo's, at its batch."""

from dataclasses import replace

import torch
from _harness import interleaved_medians, main

from meanflow_core.config import GuidanceConfig, LossConfig, TimeSamplingConfig
from meanflow_core.latents import LatentNormalization
from meanflow_core.loss import draw_step_record
from meanflow_core.presets import demo
from meanflow_core.training import build_train_state, train_step

FLOW_MATCHING = LossConfig(times=TimeSamplingConfig(fraction_r_below_t=0.0))
UNGUIDED = LossConfig()
GUIDED = LossConfig(guidance=GuidanceConfig(omega=1.0, kappa=0.5))
IDENTITY = LatentNormalization(mean=(0.0,) * 4, std=(1.0,) * 4)


def _step(loss: LossConfig):
    config = replace(demo(), loss=loss)
    state = build_train_state(config, sample_size=8, in_channels=4, num_classes=10, device=torch.device("cpu"))
    rows = config.global_batch_size
    moments = torch.randn(rows, 8, 8, 8).abs()
    labels = torch.randint(10, (rows,))
    record = draw_step_record(loss, seed=0, step=0, num_rows=rows, latent_shape=(4, 8, 8))
    return lambda: train_step(state, state.network, moments, labels, record, IDENTITY, config)


def measure() -> dict[str, float]:
    steps = {"flow_matching": _step(FLOW_MATCHING), "unguided": _step(UNGUIDED), "guided": _step(GUIDED)}
    seconds = interleaved_medians(steps, rounds=15)
    return {
        "flow_matching_step_seconds": seconds["flow_matching"],
        "unguided_over_flow_matching_time": seconds["unguided"] / seconds["flow_matching"],
        "guided_over_flow_matching_time": seconds["guided"] / seconds["flow_matching"],
    }


if __name__ == "__main__":
    main(measure, {"guided_over_flow_matching_time": ("<=", 1.80)})  # the demo trains with guidance

"""Figures that training logs: sums over an interval of steps, and rates."""

import resource
import time
from typing import Any

import torch
import torch.distributed

from meanflow_core.config import TrainingConfig
from meanflow_core.training import (
    SUMS,
    StepMetrics,
    TrainState,
    relative_ema_distance,
)


class Figures:
    """Sums over the steps of a logging interval; reading them reduces over the workers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Begins an interval."""
        self._sums = torch.zeros(len(SUMS) + 1, device=self._device)  # and the gradient's norm
        self._num_steps = 0  # that moved something
        self._num_timed = 0
        self._data_seconds = 0.0
        self._began = time.monotonic()

    def add(self, metrics: StepMetrics, data_seconds: float) -> None:
        """Adds a step, without waiting for the device."""
        self._data_seconds += data_seconds
        self._num_timed += 1
        if metrics.skipped:
            return
        self._sums[:-1] += metrics.sums
        self._sums[-1] += metrics.gradient_norm
        self._num_steps += 1

    def exclude(self, seconds: float) -> None:
        """Takes time out of the interval: pictures and checkpoints are no part of a step's pace."""
        self._began += seconds

    def state(self) -> dict[str, Any]:
        """What a checkpoint within an interval keeps, so that a resume logs the same: every worker must call this."""
        parts = [torch.zeros_like(self._sums) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, self._sums)
        return {"num_steps": self._num_steps, "sums": [part.tolist() for part in parts]}

    def restore(self, state: dict[str, Any], rank: int) -> None:
        """Goes on with an interval. With as many workers as wrote it each has its own sums, else the first has all."""
        self.clear()
        self._num_steps = state["num_steps"]
        sums = torch.tensor(state["sums"], device=self._device)
        if len(sums) == torch.distributed.get_world_size():
            self._sums = sums[rank]
        elif rank == 0:
            self._sums = sums.sum(dim=0)
            self._sums[-1] = sums[0, -1]  # the norm is every worker's

    def read(self, config: TrainingConfig, state: TrainState, step_flops: float) -> dict[str, float]:
        """The interval's figures, the same on every worker: every worker must call this."""
        seconds = time.monotonic() - self._began
        sums, gradient_norm = self._sums[:-1].clone(), self._sums[-1].item()
        torch.distributed.all_reduce(sums)
        peak = torch.tensor([_peak_bytes(self._device), seconds, self._data_seconds], device=self._device)
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
        peak_bytes, seconds, data_seconds = peak.tolist()
        total = dict(zip(SUMS, sums.tolist(), strict=True))
        num_steps = max(self._num_steps, 1)
        rows_equal, rows_below = max(total["rows_r_equals_t"], 1.0), max(total["rows_r_below_t"], 1.0)
        rows = total["rows_r_equals_t"] + total["rows_r_below_t"]
        of_head = {"squared_error_v": total["squared_error_v"] / rows} if total["squared_error_v"] else {}
        return {
            "loss": total["loss"] / num_steps,
            **of_head,
            "squared_error_r_equals_t": total["squared_error_r_equals_t"] / rows_equal,
            "squared_error_r_below_t": total["squared_error_r_below_t"] / rows_below,
            "dudt_norm": total["dudt_norm"] / rows_below,
            "gradient_norm": gradient_norm / num_steps,
            "learning_rate": state.optimizer.param_groups[0]["lr"],
            **{f"ema_distance_{decay}": value for decay, value in relative_ema_distance(state).items()},
            "num_skipped": float(state.num_skipped),
            "images_per_second": self._num_timed * config.global_batch_size / seconds,
            "model_flops_per_second": self._num_timed * step_flops / seconds,
            "data_wait_share": data_seconds / seconds,
            "peak_memory_bytes": peak_bytes,
        }


def _peak_bytes(device: torch.device) -> float:
    """Of a GPU what torch has held at most, else of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024.0


class FiniteWatch:
    """Notices a gradient that is not finite a step late, so that the device is not waited for."""

    def __init__(self) -> None:
        self._last: tuple[int, torch.Tensor, torch.cuda.Event | None] | None = None
        self.first_bad_step: int | None = None

    def add(self, step: int, metrics: StepMetrics) -> None:
        """A step was taken; looks at the one before it."""
        self.settle()
        if metrics.skipped:
            return
        is_finite, event = torch.isfinite(metrics.gradient_norm), None
        if is_finite.is_cuda:
            is_finite = is_finite.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._last = step, is_finite, event

    def settle(self) -> None:
        """Looks at the last step too."""
        if self._last is None:
            return
        step, is_finite, event = self._last
        self._last = None
        if event is not None:
            event.synchronize()
        if not bool(is_finite) and self.first_bad_step is None:
            self.first_bad_step = step

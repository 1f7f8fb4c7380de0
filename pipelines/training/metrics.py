"""Training metrics: means over a logging interval, rates, and the detection of nonfinite gradients."""

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed

from meanflow_core.config import RunConfig
from meanflow_core.training import StepMetrics, TrainState, learning_rate, read_means, relative_ema_distance


class IntervalMetrics:
    """Sums metrics over the steps of a logging interval; `read` reduces them across workers."""

    def __init__(self, metric_names: Sequence[str], device: torch.device) -> None:
        """metric_names: those of the objective."""
        self._names = metric_names
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Starts a new interval."""
        self._sums = torch.zeros(2 + 2 * len(self._names), device=self._device)  # `StepMetrics.sums`, then the norm
        self._num_steps = 0  # excluding skipped steps
        self._num_timed_steps = 0  # including skipped steps, excluding steps before a resume
        self._data_seconds = 0.0
        self._start_time = time.monotonic()

    def add(self, metrics: StepMetrics, data_seconds: float) -> None:
        """Adds a step, without waiting for the device."""
        self._data_seconds += data_seconds
        self._num_timed_steps += 1
        if metrics.skipped:
            return
        self._sums[:-1] += metrics.sums
        self._sums[-1] += metrics.gradient_norm
        self._num_steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent in this context (sampling, saving) from the interval's rates."""
        start_time = time.monotonic()
        yield
        self._start_time += time.monotonic() - start_time

    def state(self) -> dict[str, Any]:
        """Returns the interval's sums as JSON values, for a checkpoint within an interval. Collective."""
        parts = [torch.zeros_like(self._sums) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, self._sums)
        return {"num_steps": self._num_steps, "sums": [part.tolist() for part in parts]}

    def restore(self, state: dict[str, Any], rank: int) -> None:
        """Restores a saved interval. Each rank takes its own sums; if the world size has changed, rank 0 takes the total."""
        self.clear()
        self._num_steps = state["num_steps"]
        sums = torch.tensor(state["sums"], device=self._device)
        if len(sums) == torch.distributed.get_world_size():
            self._sums = sums[rank]
        elif rank == 0:
            self._sums = sums.sum(dim=0)
            self._sums[-1] = sums[0, -1]  # every rank holds the global gradient norm

    def read(self, config: RunConfig, state: TrainState, step_flops: float | None) -> dict[str, float]:
        """Returns the interval's metrics, which are the same on every worker. Collective."""
        seconds = time.monotonic() - self._start_time
        sums, gradient_norm = self._sums[:-1].clone(), self._sums[-1].item()
        torch.distributed.all_reduce(sums)
        peaks = torch.tensor([_peak_bytes(self._device), seconds, self._data_seconds], device=self._device)
        torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
        peak_bytes, seconds, data_seconds = peaks.tolist()
        num_steps = max(self._num_steps, 1)
        return {
            "loss": float(sums[0]) / num_steps,
            **read_means(self._names, sums),
            "gradient_norm": gradient_norm / num_steps,
            "learning_rate": learning_rate(config.optimizer, max(state.step - 1, 0), config.num_steps),
            **{f"ema_distance_{decay}": value for decay, value in relative_ema_distance(state).items()},
            "num_skipped": float(state.num_skipped),
            "images_per_second": self._num_timed_steps * config.global_batch_size / seconds,
            **({} if step_flops is None else {"model_flops_per_second": self._num_timed_steps * step_flops / seconds}),
            "data_wait_share": data_seconds / seconds,
            "peak_memory_bytes": peak_bytes,
        }


def _peak_bytes(device: torch.device) -> float:
    """Peak memory in bytes: on a GPU PyTorch's allocations, on a CPU the resident set of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024.0


class NonfiniteDetector:
    """Finds the first nonfinite gradient. Checks each step during the next one, to avoid a device synchronization."""

    def __init__(self) -> None:
        self._pending: tuple[int, torch.Tensor, torch.cuda.Event | None] | None = None
        self.first_nonfinite_step: int | None = None

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Checks the previous step, and queues this one."""
        self.check()
        if metrics.skipped:
            return
        is_finite, event = torch.isfinite(metrics.gradient_norm), None
        if is_finite.is_cuda:
            is_finite = is_finite.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = step, is_finite, event

    def check(self) -> None:
        """Checks the queued step."""
        if self._pending is None:
            return
        step, is_finite, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        if not bool(is_finite) and self.first_nonfinite_step is None:
            self.first_nonfinite_step = step

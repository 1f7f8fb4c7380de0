"""Use of a machine's CPU, memory, disk, network and GPUs, logged to an MLflow run."""

import logging
from typing import TypeVar

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pipelines.tracking.outbox import MetricRow, Outbox, brief

logger = logging.getLogger(__name__)

T = TypeVar("T")


class SystemMetrics(SystemMetricsMonitor):
    """MLflow's monitor of a machine, writing through a run's queue: its own stops for good at the first failed request.

    A sample every 10 s (MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL), as "system/NODE/...".
    """

    def __init__(self, outbox: Outbox, run_id: str, tracking_uri: str, node_id: str) -> None:
        super().__init__(run_id, sampling_interval=10, node_id=node_id, tracking_uri=tracking_uri)
        self._outbox = outbox

    def __enter__(self) -> "SystemMetrics":
        self.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.finish()

    def monitor(self) -> None:
        """Samples until it is told to end."""
        has_warned = False
        while not self._shutdown_event.wait(self.sampling_interval):
            try:
                self.collect_metrics()
                self.publish_metrics(self.aggregate_metrics())
            except Exception as error:  # a driver that does not answer is no reason to stop
                if not has_warned:
                    logger.warning("no system metrics of %s for now: %s", self.node_id, brief(error))
                has_warned = True

    def publish_metrics(self, metrics: dict[str, float]) -> None:
        """Queues a sample; the writer gives it its step, which goes on from the run's last one."""
        named = {f"system/{self.node_id}/{key}": float(value) for key, value in metrics.items()}
        self._outbox.put(MetricRow(named, step=None, numbers_itself=True))
        for monitor in self.monitors:
            monitor.clear_metrics()

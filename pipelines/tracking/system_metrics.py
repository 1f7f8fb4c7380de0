"""A machine's use of CPU, memory, disk, network and GPUs, logged to an MLflow run."""

import logging

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pipelines.tracking.outbox import MetricRow, Outbox
from pipelines.tracking.server import one_line

logger = logging.getLogger(__name__)


class SystemMetrics(SystemMetricsMonitor):
    """MLflow's monitor of a machine, writing through a run's outbox as "system/NODE/...".

    MLflow's own writer stops for good at the first failed request. A sample is taken every 10 s
    (MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL), and the mean of 6 samples is logged
    (MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING): about 70,000 values a day from a node with 8 GPUs.
    """

    def __init__(self, outbox: Outbox, run_id: str, tracking_uri: str, node_id: str) -> None:
        super().__init__(
            run_id, sampling_interval=10, samples_before_logging=6, node_id=node_id, tracking_uri=tracking_uri
        )
        self._outbox = outbox

    def __enter__(self) -> "SystemMetrics":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def monitor(self) -> None:
        """Takes samples until `finish`. The last mean may be of fewer samples."""
        has_warned, num_samples, is_finished = False, 0, False
        while not is_finished:
            is_finished = self._shutdown_event.wait(self.sampling_interval)
            try:
                self.collect_metrics()
                num_samples += 1
                if is_finished or num_samples % self.samples_before_logging == 0:
                    self.publish_metrics(self.aggregate_metrics())
            except Exception as error:  # a driver that does not answer must not end the monitor
                if not has_warned:
                    logger.warning("cannot read system metrics of %s: %s", self.node_id, one_line(error))
                has_warned = True

    def publish_metrics(self, metrics: dict[str, float]) -> None:
        """Queues a sample. It has no step: the outbox continues from the run's last one."""
        named = {f"system/{self.node_id}/{key}": float(value) for key, value in metrics.items()}
        self._outbox.put(MetricRow(named, step=None))
        for monitor in self.monitors:
            monitor.clear_metrics()

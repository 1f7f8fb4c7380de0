from pipelines.tracking.system_metrics import SystemMetrics
from tests.support.waiting import wait_until


class ListOutbox:
    """Collects the rows that would be logged."""

    def __init__(self):
        self.rows = []
        self.put = self.rows.append


def test_the_mean_of_six_samples_is_logged(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    outbox, samples = ListOutbox(), []

    class Numbered(SystemMetrics):
        def collect_metrics(self):
            samples.append(len(samples))
            self.monitors[0]._metrics["number"].append(samples[-1])

    with Numbered(outbox, "run", f"sqlite:///{tmp_path}/mlflow.db", "node-1"):
        wait_until(lambda: len(outbox.rows) >= 3)
    means = [row.metrics["system/node-1/number"] for row in outbox.rows]
    assert means[:3] == [2.5, 8.5, 14.5]
    assert len(means) == -(-len(samples) // 6)  # the last one may be of fewer samples

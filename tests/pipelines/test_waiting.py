"""What is said while workers wait for a cluster."""

import pytest

from pipelines import cluster


@pytest.mark.parametrize(
    ("address", "total", "expected"),
    [
        ("head:6379", 8, "4 workers have not started yet. They need 4 GPUs; the cluster has 8, of which 1 are free"),
        (None, 2, "4 workers have not started yet. They need 4 GPUs; the cluster has 2, of which 1 are free"),
        (None, 4, "4 workers are starting"),  # a local cluster is this job's own
    ],
)
def test_waiting_names_what_is_needed_and_what_is_free(address, total, expected, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "available_resources", lambda: {"GPU": 1.0})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": float(total)})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster.describe_waiting(4, use_gpu=True) == expected

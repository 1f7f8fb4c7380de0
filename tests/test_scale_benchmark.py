"""tests/benchmarks/scale runs at toy sizes, so that it keeps up with the code that it measures."""

import json
import subprocess
import sys

import pytest

from tests.support.readme import REPOSITORY

QUICK = (
    "encode/folders", "encode/webdataset", "train/samples", "train/draws", "train/metrics", "serve/classes", "serve/queue"
)  # fmt: skip
SLOW = ("encode/parquet", "train/control", "train/mlflow", "evaluate/sums")


def rows_of(experiments, output) -> dict[str, list[dict]]:
    """Runs experiments at toy sizes. Returns {experiment: rows of its results}."""
    command = [sys.executable, "tests/benchmarks/scale", "--num-images", "2000", "--json", str(output)]
    process = subprocess.run(
        [*command, "--parts", *experiments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert output.exists(), process.stderr
    rows: dict[str, list[dict]] = {}
    for row in json.loads(output.read_text())["rows"]:
        rows.setdefault(row["experiment"], []).append(row)
    return rows


def check(rows, experiments) -> None:
    # The exit code and the limits are not checked: toy sizes say nothing about growth.
    assert set(rows) == set(experiments)
    for experiment, found in rows.items():
        assert len({row["size"] for row in found}) == 3, experiment
        assert all(row["seconds"] > 0.0 and row["peak_megabytes"] > 10.0 for row in found)


def test_scale_benchmark_measures_every_size_without_a_cluster(tmp_path):
    check(rows_of(QUICK, tmp_path / "scale.json"), QUICK)


@pytest.mark.soak
@pytest.mark.cluster
def test_scale_benchmark_measures_every_size_with_ray_gloo_and_mlflow(tmp_path):
    check(rows_of(SLOW, tmp_path / "scale.json"), SLOW)

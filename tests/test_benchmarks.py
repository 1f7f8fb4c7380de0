"""The benchmarks that need a GPU or long run at toy sizes, so that they keep up with the code that they measure."""

import json
import os
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


def test_every_part_of_the_gpu_benchmark_runs_on_a_cpu(tmp_path):
    files = ["--json", str(tmp_path / "gpu.json"), "--markdown", str(tmp_path / "gpu.md")]
    command = [sys.executable, "tests/benchmarks/gpu", "--toy", *files]
    environment = {**os.environ, "PYTHONPATH": ""}  # the script finds the package by itself
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [part["title"] for part in parts if not part["figures"]] == []
    assert len(parts) == 10
    assert (tmp_path / "gpu.md").read_text().count("\n## ") == 10

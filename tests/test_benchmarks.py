"""The benchmarks that need a GPU or long run at toy sizes, so that they keep up with the code that they measure."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.readme import REPOSITORY

EXPERIMENTS = (
    "encode/folders", "encode/parquet", "encode/webdataset", "train/samples", "train/draws", "train/control",
    "train/metrics", "train/mlflow", "evaluate/sums", "serve/classes", "serve/queue",
)  # fmt: skip


@pytest.mark.soak
@pytest.mark.cluster
def test_scale_benchmark_measures_every_experiment_at_every_size(tmp_path):
    output = tmp_path / "scale.json"
    command = [sys.executable, "tests/benchmarks/scale", "--num-images", "2000", "--json", str(output)]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert output.exists(), process.stderr
    # The exit code and the limits are not checked: toy sizes say nothing about growth.
    rows = json.loads(output.read_text())["rows"]
    for experiment in EXPERIMENTS:
        found = [row for row in rows if row["experiment"] == experiment]
        assert len({row["size"] for row in found}) == 3, experiment
        assert all(row["seconds"] > 0.0 and row["peak_megabytes"] > 10.0 for row in found)
    assert {row["experiment"] for row in rows} == set(EXPERIMENTS)


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

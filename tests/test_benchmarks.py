"""The benchmarks that need hardware which tests do not have still run, at toy sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_part_of_the_gpu_benchmark_runs_on_a_cpu(tmp_path):
    files = ["--json", str(tmp_path / "gpu.json"), "--markdown", str(tmp_path / "gpu.md")]
    command = [sys.executable, "tests/benchmarks/gpu", "--toy", *files]
    environment = {**os.environ, "PYTHONPATH": ""}  # the script finds the package by itself
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [part["title"] for part in parts if not part["figures"]] == []
    assert len(parts) == 10
    assert (tmp_path / "gpu.md").read_text().count("\n## ") == 10

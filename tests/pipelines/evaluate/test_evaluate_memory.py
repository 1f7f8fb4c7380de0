"""Memory of an evaluation."""

import json
import subprocess
import sys

import pytest

from tests.support.readme import REPOSITORY


@pytest.mark.soak
@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_peak_memory_is_independent_of_the_number_of_samples(tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, "tests/benchmarks/evaluate.py", "--only", "memory", "--json", str(file)]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    figures = json.loads(file.read_text())["figures"]
    print(figures)
    assert run.returncode == 0, run.stdout + run.stderr
    assert 0.5 < figures["peak_gigabytes_at_2000"] < 6.0
    assert figures["peak_memory_growth"] <= 1.15

import json
import subprocess
import sys

import pytest

from tests.support.readme import REPOSITORY


@pytest.mark.soak
@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_peak_memory_does_not_grow_with_the_number_of_images(tmp_path):
    output = tmp_path / "figures.json"
    command = [sys.executable, "tests/benchmarks/encode.py", "--only", "memory", "--json", str(output)]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    figures = json.loads(output.read_text())["figures"] if output.exists() else {}
    assert process.returncode == 0, f"{figures}\n{process.stdout}{process.stderr}"
    assert 0.5 < figures["peak_gigabytes_at_2000"] < 6.0
    assert figures["peak_memory_growth"] <= 1.15

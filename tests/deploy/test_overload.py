import pytest

from tests.benchmarks._harness import write_demo_generator
from tests.benchmarks._serve_server import overload


@pytest.mark.soak
@pytest.mark.cluster
@pytest.mark.parametrize("topology", ["one", "two"])
def test_overload_yields_only_images_and_429s_and_memory_stays_flat(tmp_path, topology):
    seen = overload(write_demo_generator(tmp_path / "generator"), seconds=60, topology=topology)
    assert set(seen.answers.statuses) == {"200", "429"}
    assert seen.answers.per_second > 0.5 * seen.saturation  # refusing does not starve accepted requests
    # The load exceeded saturation. On two cores Serve itself cannot answer twice the saturation, even with empty answers.
    assert len(seen.answers.rows) / seen.answers.seconds > 1.15 * seen.saturation
    assert seen.memory_growth <= 0.05, seen.memory

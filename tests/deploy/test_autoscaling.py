"""Tests autoscaling with deploy/serve.yaml and shortened delays."""

from pathlib import Path

import pytest
import yaml

from tests.support.endpoint import running_endpoint, write_generator
from tests.support.endpoint_load import Load, expected_images, wait_for_replicas

SERVE_CONFIG = Path(__file__).parents[2] / "deploy" / "serve.yaml"


@pytest.mark.soak
@pytest.mark.cluster
def test_replicas_scale_with_load_without_losing_requests(tmp_path):
    model = write_generator(tmp_path / "first")
    expected = {"first": expected_images(model)}
    generator = next(
        deployment
        for deployment in yaml.safe_load(SERVE_CONFIG.read_text())["applications"][0]["deployments"]
        if deployment["name"] == "ImageGenerator"
    )
    shortened = {"max_replicas": 2, "target_ongoing_requests": 3, "upscale_delay_s": 1, "downscale_delay_s": 3}
    assert set(shortened) < set(generator["autoscaling_config"])
    generator["autoscaling_config"] |= shortened
    arguments = {"model": str(model), "topology": "two", "max_batch_size": 8, "batch_wait_seconds": 0.002}
    with running_endpoint(arguments, [generator]) as endpoint:
        wait_for_replicas(endpoint, 1)
        with Load(endpoint.url, expected, num_clients=8) as heavy:
            wait_for_replicas(endpoint, 2)
            heavy.wait_for_answers(200)
        with Load(endpoint.url, expected, num_clients=1) as light:
            wait_for_replicas(endpoint, 1)
    print("scaled up:", dict(heavy.outcomes), "scaled down:", dict(light.outcomes))
    assert heavy.wrong_images == light.wrong_images == []
    assert set(heavy.outcomes) == set(light.outcomes) == {(200, "first")}

"""As many replicas as are wanted, by the shipped Serve config, whose waiting times are shortened here."""

import time
from pathlib import Path

import pytest
import yaml

from meanflow_core.generator import load_pipeline
from tests.deploy.test_live import CLASS, SEEDS, Load, wait_for_replicas
from tests.support.endpoint import running_endpoint, write_generator

SHIPPED = Path(__file__).parents[2] / "deploy" / "serve.yaml"


@pytest.mark.soak
@pytest.mark.cluster
def test_replicas_come_with_the_load_and_go_with_it_and_no_request_is_lost(tmp_path):
    model = write_generator(tmp_path / "first")
    images = load_pipeline(model).images_from_seeds([CLASS] * len(SEEDS), list(SEEDS)).numpy().astype(int)
    generator = next(
        deployment
        for deployment in yaml.safe_load(SHIPPED.read_text())["applications"][0]["deployments"]
        if deployment["name"] == "ImageGenerator"
    )
    shortened = {"max_replicas": 2, "target_ongoing_requests": 3, "upscale_delay_s": 1, "downscale_delay_s": 3}
    assert set(shortened) < set(generator["autoscaling_config"])
    generator["autoscaling_config"] |= shortened
    arguments = {"model": str(model), "max_batch_size": 8, "batch_wait_seconds": 0.002}
    with running_endpoint(arguments, [generator], num_cpus=4) as endpoint:
        wait_for_replicas(endpoint, 1)
        with Load(endpoint.url, {"first": images}, num_callers=8) as load:
            wait_for_replicas(endpoint, 2)
            first = sum(load.kinds.values())
            while sum(load.kinds.values()) < first + 200:
                time.sleep(0.05)
        with Load(endpoint.url, {"first": images}, num_callers=1) as calm:
            wait_for_replicas(endpoint, 1)
    print("more:", dict(load.kinds), "fewer:", dict(calm.kinds))
    assert load.wrong == calm.wrong == []
    assert set(load.kinds) == set(calm.kinds) == {(200, "first")}

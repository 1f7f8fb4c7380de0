import pytest
from pydantic import ValidationError

from deploy.settings import API_SETTINGS, Arguments, apply_user_config, split_user_config


def test_user_config_may_change_only_settings_of_its_deployment():
    arguments = Arguments(model="m", max_images=7)
    changed = apply_user_config(arguments, {"max_steps": 3}, API_SETTINGS)
    assert (changed.max_images, changed.max_steps) == (7, 3)
    with pytest.raises(ValueError, match="but got model, num_gpus;"):
        apply_user_config(arguments, {"num_gpus": 1, "model": "x"}, API_SETTINGS)
    with pytest.raises(ValidationError, match="rate_limit"):
        apply_user_config(arguments, {"rate_limit": "often"}, API_SETTINGS)


def test_batch_sizes_are_parsed_from_the_command_line_and_cover_max_batch_size():
    assert Arguments(model="m", batch_sizes="1,4,16").batch_sizes == [1, 4, 16]
    assert Arguments(model="m", compile=True, max_batch_size=12).batch_sizes == [1, 2, 4, 8, 12]
    assert Arguments(model="m").batch_sizes == []
    with pytest.raises(ValidationError, match=r"a size of at least max_batch_size = 16, but got \[1, 4\]"):
        Arguments(model="m", batch_sizes="1,4")


def test_topology_one_refuses_a_number_of_api_replicas():
    with pytest.raises(ValidationError, match="num_api_replicas 2 requires topology two"):
        Arguments(model="m", num_api_replicas=2)
    assert Arguments(model="m", topology="two", num_api_replicas=2).num_api_replicas == 2
    assert split_user_config({"model": "m", "max_steps": 3, "unknown": 1}) == (
        {"model": "m"},
        {"max_steps": 3, "unknown": 1},
    )

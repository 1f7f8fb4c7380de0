"""Validates a Serve config as Serve and the application do, and also refuses keys that Serve would ignore."""

from typing import Any

import yaml
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from deploy.settings import API_SETTINGS, GENERATOR_SETTINGS, Arguments, apply_user_config

SETTINGS = {
    "one": {"Endpoint": GENERATOR_SETTINGS | API_SETTINGS},
    "two": {"ImageGenerator": GENERATOR_SETTINGS, "Api": API_SETTINGS},
}


def validated(text: str) -> tuple[dict[str, Any], dict[str, Arguments]]:
    """(the config, {deployment: the application's arguments with its user_config}). Raises for an invalid config."""
    content = yaml.safe_load(text)
    config = ServeDeploySchema.model_validate(content)
    _refuse_ignored_keys(content, config.model_dump(exclude_unset=True, mode="json"), "config")
    [application] = content["applications"]
    arguments = Arguments.model_validate(application["args"])
    settings = {}
    for deployment in application["deployments"]:
        name = deployment["name"]
        settings[name] = apply_user_config(arguments, deployment.get("user_config"), SETTINGS[arguments.topology][name])
        scaling = deployment.get("autoscaling_config", {})  # ServeDeploySchema does not validate it
        AutoscalingConfig.model_validate(scaling)
        assert set(scaling) <= set(AutoscalingConfig.model_fields), scaling
    return content, settings


def _refuse_ignored_keys(given: Any, kept: Any, path: str) -> None:
    if isinstance(given, dict):
        assert set(given) <= set(kept), f"Serve ignores {path}: {set(given) - set(kept)}"
        for key in given:
            _refuse_ignored_keys(given[key], kept[key], f"{path}.{key}")
    elif isinstance(given, list):
        for inner, other in zip(given, kept, strict=True):
            _refuse_ignored_keys(inner, other, path)

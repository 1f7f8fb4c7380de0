"""Presets: one function per experiment, each returning its full configuration. Variants use `replace(...)`.

Unless stated otherwise, FID is the paper's value for 50,000 samples on ImageNet 256x256 with one function evaluation
(1 NFE). No published preset has been trained with this code yet. GFLOPs are for one forward of one image, counting a
multiply-add as one operation.

Every public function without arguments that returns a TrainingConfig is a preset of `meanflow train`; one that returns a
RefineConfig is a preset of `meanflow refine`. The modules of new objectives also hold the objective's configuration. They
import the standard library only, so that --help is quick.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from meanflow_core.config import RefineConfig, RunConfig, TrainingConfig
from meanflow_core.references import resolve

Config = TypeVar("Config", bound=RunConfig)


def _collect(kind: type[Config]) -> dict[str, Callable[[], Config]]:
    found: dict[str, Callable[[], Config]] = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for name, function in vars(module).items():
            if (
                inspect.isfunction(function)
                and not name.startswith("_")
                and function.__module__ == module.__name__
                and inspect.get_annotations(function) == {"return": kind}
            ):
                found[name] = function
    return found


PRESETS = _collect(TrainingConfig)
_PRESETS: dict[type[RunConfig], dict[str, Callable[[], Any]]] = {
    TrainingConfig: PRESETS,
    RefineConfig: _collect(RefineConfig),
}


def presets_of(kind: type[RunConfig]) -> Mapping[str, Callable[[], Any]]:
    """{name: preset} of the presets that return this class."""
    return _PRESETS[kind]


def preset_config(name: str, kind: type[Any] = TrainingConfig) -> Any:
    """The configuration of the preset with this name, or of the function that "module:function" refers to.

    kind: the configuration's class, TrainingConfig or RefineConfig. Raises ValueError, with the known names, for an unknown
    name; if a module or function cannot be imported; or if it does not return that class.
    """
    presets = presets_of(kind)
    if ":" not in name and name not in presets:
        raise ValueError(
            f"unknown preset {name!r}; known: {', '.join(presets)}, or module:function for one of your own"
        )
    function = presets[name] if name in presets else resolve(name)
    rule = f"a preset must be a function without arguments that returns a {kind.__name__}"
    if not callable(function):
        raise ValueError(f"{rule}, but {name} is {function!r}")
    try:
        config = function()
    except TypeError as error:
        raise ValueError(f"{rule}, but {name} fails: {error}") from error
    if not isinstance(config, kind):
        raise ValueError(f"{rule}, but {name} returns {config!r}")
    return config

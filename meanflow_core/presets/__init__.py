"""Presets: one function per experiment, each returning its full configuration. Variants use `replace(...)`.

Unless stated otherwise, FID is the paper's value for 50,000 samples on ImageNet 256x256 with one function evaluation
(1 NFE). No published preset has been trained with this code yet. GFLOPs are for one forward of one image, counting a
multiply-add as one operation.

Every public function without arguments that returns a TrainingConfig is a preset. The modules of new objectives
also hold the objective's configuration. They import the standard library only, so that --help is quick.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable

from meanflow_core.config import TrainingConfig
from meanflow_core.references import resolve

Preset = Callable[[], TrainingConfig]


def _collect() -> dict[str, Preset]:
    found: dict[str, Preset] = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for name, function in vars(module).items():
            if (
                inspect.isfunction(function)
                and not name.startswith("_")
                and function.__module__ == module.__name__
                and inspect.get_annotations(function) == {"return": TrainingConfig}
            ):
                found[name] = function
    return found


PRESETS = _collect()


def preset_config(name: str) -> TrainingConfig:
    """The configuration of the preset with this name, or of the function that "module:function" refers to.

    Raises ValueError, with the known names, for an unknown name; if a module or function cannot be imported; or if it does
    not return a TrainingConfig.
    """
    if ":" not in name and name not in PRESETS:
        raise ValueError(
            f"unknown preset {name!r}; known: {', '.join(PRESETS)}, or module:function for one of your own"
        )
    function = PRESETS[name] if name in PRESETS else resolve(name)
    rule = "a preset must be a function without arguments that returns a TrainingConfig"
    if not callable(function):
        raise ValueError(f"{rule}, but {name} is {function!r}")
    try:
        config = function()
    except TypeError as error:
        raise ValueError(f"{rule}, but {name} fails: {error}") from error
    if not isinstance(config, TrainingConfig):
        raise ValueError(f"{rule}, but {name} returns {config!r}")
    return config

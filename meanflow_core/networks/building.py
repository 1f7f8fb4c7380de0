"""Building networks from their configurations."""

from dataclasses import asdict
from typing import Any

from torch import nn

from meanflow_core.config import NetworkConfig
from meanflow_core.networks.forward_mode import ForwardModeNetwork
from meanflow_core.networks.interface import NetworkModel
from meanflow_core.references import resolve


def build_network(config: NetworkConfig, *, sample_size: int, in_channels: int, num_classes: int) -> NetworkModel:
    """Builds a randomly initialised network for latents of shape (in_channels, sample_size, sample_size).

    A plain torch.nn.Module becomes a `ForwardModeNetwork`. Raises ValueError for an unknown class or incompatible sizes.
    """
    sizes = {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}
    if issubclass(find_network_class(config.network), NetworkModel):
        return find_network_class(config.network)(**sizes, **asdict(config))
    return ForwardModeNetwork(module=config.network, arguments=asdict(config), **sizes)


def find_network_class(reference: str) -> type[Any]:
    """The network class that "module:Class" refers to: a NetworkModel or another torch.nn.Module.

    Imports the module. Raises ValueError if there is no such class, or if it is something else.
    """
    found = resolve(reference)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"a network must be a subclass of torch.nn.Module, but {reference!r} is {found!r}")
    return found


def require_same_architecture(network: NetworkModel, expected: NetworkModel) -> None:
    """Raises ValueError, listing all differences, if the networks differ in class or size."""
    found, required = dict(network.config), dict(expected.config)
    differences = [
        f"{name} is {found.get(name)}, expected {required.get(name)}"
        for name in sorted({*found, *required})
        if not name.startswith("_") and found.get(name) != required.get(name)
    ]
    if type(network) is not type(expected):
        differences.insert(0, f"class is {type(network).__name__}, expected {type(expected).__name__}")
    if differences:
        raise ValueError(f"the networks differ: {'; '.join(differences)}")

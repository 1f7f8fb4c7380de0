"""Building networks from their configurations."""

import json
from dataclasses import asdict

from meanflow_core.config import NetworkConfig
from meanflow_core.networks.forward_mode import ForwardModeNetwork, find_network_class
from meanflow_core.networks.interface import NetworkModel


def build_network(config: NetworkConfig, *, sample_size: int, in_channels: int, num_classes: int) -> NetworkModel:
    """Builds a randomly initialised network for latents of shape (in_channels, sample_size, sample_size).

    A plain torch.nn.Module becomes a `ForwardModeNetwork`. Raises ValueError for an unknown class, or arguments that the
    class refuses.
    """
    sizes = {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}
    network_class = find_network_class(config.network)
    if issubclass(network_class, NetworkModel):
        return network_class(**sizes, **asdict(config))
    # As JSON values, because these are what a generator's config.json has.
    arguments = json.loads(json.dumps(asdict(config)))
    return ForwardModeNetwork(module_class=config.network, arguments=arguments, **sizes)


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

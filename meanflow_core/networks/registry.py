"""The network classes, and building one from its configuration."""

import torch

from meanflow_core.config import NetworkConfig
from meanflow_core.networks.dit import MeanFlowDiT
from meanflow_core.networks.improved_dit import ImprovedMeanFlowDiT

AnyNetwork = MeanFlowDiT | ImprovedMeanFlowDiT

# {class name in a saved generator: class}; no other classes are loaded.
NETWORKS: dict[str, type[MeanFlowDiT] | type[ImprovedMeanFlowDiT]] = {
    network.__name__: network for network in (MeanFlowDiT, ImprovedMeanFlowDiT)
}


def build_network(config: NetworkConfig, *, sample_size: int, in_channels: int, num_classes: int) -> AnyNetwork:
    """Builds a randomly initialised network for latents of shape (in_channels, sample_size, sample_size).

    Raises ValueError for incompatible sizes.
    """
    arguments = {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "num_classes": num_classes,
        "patch_size": config.patch_size,
        "hidden_size": config.hidden_size,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
    }
    if config.architecture == "imf_dit":
        return ImprovedMeanFlowDiT(**arguments, aux_head_depth=config.aux_head_depth)
    return MeanFlowDiT(**arguments)


def require_same_architecture(network: AnyNetwork, expected: AnyNetwork) -> None:
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


def without_velocity_head(network: AnyNetwork) -> AnyNetwork:
    """Copies an improved MeanFlow network without its v head, which only training uses. The copy shares the parameters.

    Returns any other network unchanged.
    """
    if not isinstance(network, ImprovedMeanFlowDiT):
        return network
    config = {name: value for name, value in network.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        copy = type(network)(**{**config, "has_velocity_head": False})
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("v_")}
    copy.load_state_dict(state, assign=True)
    # The state dict lacks non-persistent buffers, so these are still on the meta device.
    for name, buffer in network.named_buffers():
        setattr(copy, name, buffer.clone())
    return copy.train(network.training)

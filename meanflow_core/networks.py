"""The networks of this package, by the names that a configuration and a saved generator give them."""

import torch

from meanflow_core.config import NetworkConfig
from meanflow_core.imf_transformer import ImprovedMeanFlowDiT
from meanflow_core.transformer import MeanFlowDiT

AnyNetwork = MeanFlowDiT | ImprovedMeanFlowDiT

# By class name: what a saved generator names, and all that is ever loaded.
NETWORKS: dict[str, type[MeanFlowDiT] | type[ImprovedMeanFlowDiT]] = {
    network.__name__: network for network in (MeanFlowDiT, ImprovedMeanFlowDiT)
}


def build_network(config: NetworkConfig, *, sample_size: int, in_channels: int, num_classes: int) -> AnyNetwork:
    """A network of random parameters for latents (in_channels, sample_size, sample_size), in torch's default dtype.

    Raises ValueError where the sizes do not fit.
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


def require_same_kind(network: AnyNetwork, wanted: AnyNetwork) -> None:
    """Raises ValueError, naming every difference, where a network's kind or size is not the wanted one's."""
    theirs, ours = dict(network.config), dict(wanted.config)
    different = [
        f"{name} is {theirs.get(name)}, wanted {ours.get(name)}"
        for name in sorted({*theirs, *ours})
        if not name.startswith("_") and theirs.get(name) != ours.get(name)
    ]
    if type(network) is not type(wanted):
        different.insert(0, f"it is a {type(network).__name__}, wanted {type(wanted).__name__}")
    if different:
        raise ValueError(f"the network is another: {'; '.join(different)}")


def without_velocity_head(network: ImprovedMeanFlowDiT) -> ImprovedMeanFlowDiT:
    """A copy of an improved MeanFlow network without what only training needs, in the same dtype, on the same device."""
    config = {name: value for name, value in network.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        small = type(network)(**{**config, "has_velocity_head": False})
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("v_")}
    small.load_state_dict(state, assign=True)
    # Buffers are no part of a state, and were made on no device.
    for name, buffer in network.named_buffers():
        setattr(small, name, buffer.clone())
    return small.train(network.training)

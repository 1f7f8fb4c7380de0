"""Shards a network's parameters, gradients and optimiser moments over devices with FSDP2.

Use it for networks that do not fit on one device; DDP is simpler and equally exact. The loss calls a sharded network
two or three times before one backward.
"""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.torch_version import TorchVersion

from meanflow_core.networks.interface import NetworkModel

# In older releases, forward-mode AD fails in FSDP2's hooks (pytorch#182641). `networks.forward_mode` uses it; the derivatives
# of `networks.dual` are ordinary tensors.
OLDEST_TORCH = "2.13"


def shard_network(network: NetworkModel) -> None:
    """Shards a network in place: one group per transformer block, and one for the rest (embedders, tokens, last layers).

    Parameters become DTensors, and every forward and every full read of a parameter becomes a collective operation. Call
    it on every rank, after `training.compile_blocks` and before building the optimiser, and for the moving averages too.
    Backward averages gradients over all ranks, so multiply the loss by their number. For mixed precision, run the
    network under autocast: an FSDP policy would cast its inputs, and round nearby times to the same value.
    Raises RuntimeError for torch older than 2.13; the rest of the package also works with 2.11.
    """
    if TorchVersion(torch.__version__) < OLDEST_TORCH:
        raise RuntimeError(
            f"sharding needs torch {OLDEST_TORCH} or newer, but this is {torch.__version__}: "
            "in older releases, forward-mode AD fails in FSDP2's hooks (pytorch#182641)"
        )
    blocks: list[nn.Module] = []
    for module_list in network.modules():
        if isinstance(module_list, nn.ModuleList):
            blocks.extend(module_list)
    modules: list[nn.Module] = [*reversed(blocks), network]
    for module in modules:  # inner modules before those that contain them
        module.register_forward_pre_hook(_clear_autocast_cache)
        # By default, FSDP reshards the root in backward only. Sampling has no backward, and a moving average that is still
        # gathered cannot be updated.
        fully_shard(module, reshard_after_forward=True)


@torch.compiler.disable
def _clear_autocast_cache(module: nn.Module, arguments: object) -> None:
    # Autocast would reuse a weight's cast from a no-grad forward in the training forward. Its gradient would then arrive
    # after FSDP has reduced the block's gradients, and be lost silently (pytorch#158232).
    torch.clear_autocast_cache()

"""Shards a network's parameters, gradients and optimiser moments over devices with FSDP2.

Use it for networks that do not fit on one device; DDP is simpler and equally exact. The loss calls a sharded network
two or three times before one backward.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.torch_version import TorchVersion

from meanflow_core.networks import AnyNetwork

# In older releases, forward-mode AD fails in FSDP2's hooks (pytorch#182641). Our derivatives are ordinary tensors (see
# `dual`), but tests compare them with torch.func.jvp.
OLDEST_TORCH = "2.13"


def shard_network(
    network: AnyNetwork, mesh: DeviceMesh | None = None, mixed_precision: MixedPrecisionPolicy | None = None
) -> None:
    """Shards a network in place: one group per transformer block, and one for the rest (embedders, tokens, last layers).

    Parameters become DTensors, and every forward and every read of a parameter becomes collective. Call it on every
    rank, after `training.compile_blocks` and before building the optimiser, and on the moving averages too. Backward
    averages gradients over the ranks of `mesh` (default: all), so multiply the loss by their number.

    mixed_precision: leave it out for plain autocast. With a param_dtype, blocks are gathered and kept for backward in
    that dtype; the network must still run under autocast, and its derivative cannot be computed in float32.
    Raises RuntimeError for torch older than 2.13, ValueError for a policy that casts inputs, because they include times.
    """
    if TorchVersion(torch.__version__) < OLDEST_TORCH:
        raise RuntimeError(
            f"sharding needs torch {OLDEST_TORCH} or newer, but this is {torch.__version__}: "
            "in older releases, forward-mode AD fails in FSDP2's hooks (pytorch#182641)"
        )
    policy = mixed_precision or MixedPrecisionPolicy()
    if policy.param_dtype is not None and policy.cast_forward_inputs:
        raise ValueError(
            "mixed_precision must have cast_forward_inputs=False, but it casts inputs to "
            f"{policy.param_dtype}, which rounds nearby times to the same value; call the network under autocast"
        )
    blocks = [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]
    for module in (*blocks, network):
        module.register_forward_pre_hook(_clear_autocast_cache)
        # The root is resharded too: sampling has no backward that would reshard it, and a gathered moving average could
        # not be updated.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


@torch.compiler.disable
def _clear_autocast_cache(module: nn.Module, arguments: object) -> None:
    # Autocast would reuse a weight's cast from a no-grad forward in the training forward. Its gradient would then arrive
    # after FSDP has reduced the block's gradients, and be lost silently (pytorch#158232).
    torch.clear_autocast_cache()

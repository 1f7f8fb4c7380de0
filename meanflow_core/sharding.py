"""A network shared out over devices with FSDP2: parameters, gradients and optimiser moments, each device its part.

For networks too large for every device to hold whole; DDP is simpler and as exact. The objective calls a sharded
network as it calls any other, twice or three times before one backward.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.torch_version import TorchVersion

from meanflow_core.networks import AnyNetwork

# The release that is tested; older ones fail where forward-mode AD meets FSDP2's hooks (pytorch#182641). Our
# derivatives are ordinary tensors (see `dual`) and never do, but a check of them by torch.func.jvp does.
OLDEST_TORCH = "2.13"


def shard_network(
    network: AnyNetwork, mesh: DeviceMesh | None = None, mixed_precision: MixedPrecisionPolicy | None = None
) -> None:
    """Shards a network in place: every transformer block a group of its own, and the rest (embedders, tokens, last
    layers) one more. Its parameters become DTensors; every call of it is then collective, and every read of them.

    Call it on every rank: after `training.compile_blocks`, which then compiles what lies between FSDP's hooks, and
    before the optimiser is made. Moving averages are copied before and sharded alike. Backward averages gradients
    over the ranks of `mesh` (by default all), so a loss over the global number of rows wants a factor of their number.

    mixed_precision: none under plain autocast. With a param_dtype, blocks are gathered and kept for backward in it;
    the network is still to be called under autocast, and there is no float32 pass for its derivative.
    Raises RuntimeError for torch older than 2.13, ValueError for a policy that casts inputs, times among them.
    """
    if TorchVersion(torch.__version__) < OLDEST_TORCH:
        raise RuntimeError(
            f"sharding needs torch {OLDEST_TORCH} or newer, but this is {torch.__version__}: "
            "older ones fail where forward-mode AD meets FSDP2's hooks (pytorch#182641)"
        )
    policy = mixed_precision or MixedPrecisionPolicy()
    if policy.param_dtype is not None and policy.cast_forward_inputs:
        raise ValueError(
            "mixed_precision must have cast_forward_inputs=False, but it casts inputs to "
            f"{policy.param_dtype}, which merges neighbouring times; call the network under autocast"
        )
    blocks = [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]
    for module in (*blocks, network):
        module.register_forward_pre_hook(_forget_casts)
        # The root too gives its parameters back after a call: sampling has no backward that would do it, and a moving
        # average left gathered could not be updated.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


@torch.compiler.disable
def _forget_casts(module: nn.Module, arguments: object) -> None:
    # Autocast keeps a weight's cast from a call without a graph for the graded one. Its gradient would then arrive
    # after FSDP has reduced the block's, and be lost without a word (pytorch#158232).
    torch.clear_autocast_cache()

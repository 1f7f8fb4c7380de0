"""Optimisers by name. Each is one function of the network and the configuration; all follow its learning rate schedule.

A new one is a function here, or in a module of your own as "module:function". It returns a list of torch optimisers, which
together update every parameter once. Training sets the learning rate of each of their groups to the schedule's, times the
group's "learning_rate_factor" if it has one.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from meanflow_core.config import OptimizerConfig
from meanflow_core.references import resolve

Named = list[tuple[str, nn.Parameter]]


def adam(network: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Adam, as in MeanFlow and improved MeanFlow. Raises ValueError for weight decay, which AdamW applies correctly."""
    if config.weight_decay:
        raise ValueError(f"optimizer.weight_decay is for adamw and muon, but got {config.weight_decay} for adam")
    groups = parameter_groups(network.named_parameters(), config)
    betas = (config.beta1, config.beta2)
    return [torch.optim.Adam(groups, lr=config.learning_rate, betas=betas, **_implementation(network))]


def adamw(network: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Adam with decoupled weight decay."""
    return [_adamw(list(network.named_parameters()), network, config)]


def muon(network: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all other parameters (Jordan et al. 2024; torch.optim.Muon).

    The blocks are the network's module lists. A network without any uses Muon for the weights of all linear layers.
    Muon's update is scaled to AdamW's root mean square, so that both take the same learning rate (Liu et al. 2025).
    """
    lists: list[nn.Module] = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    linear = [module for root in (lists or [network]) for module in root.modules() if isinstance(module, nn.Linear)]
    chosen = {id(module.weight) for module in linear}
    matrices = [(name, value) for name, value in network.named_parameters() if id(value) in chosen]
    others = [(name, value) for name, value in network.named_parameters() if id(value) not in chosen]
    if not matrices:
        raise ValueError("muon needs a network with linear layers, but this one has none; choose adamw")
    first = Muon(
        parameter_groups(matrices, config),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return [first, _adamw(others, network, config)] if others else [first]


class Muon(torch.optim.Muon):
    """torch's Muon, which also updates sharded matrices as one process would.

    torch's own computes on shards, with partial sums in bfloat16 that depend on the number of shards, and communicates in
    every product. Here, each process gathers a matrix's update once and orthogonalises it alone.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        if not any(isinstance(value, DTensor) for group in self.param_groups for value in group["params"]):
            super().step()
            return
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None:
                    self._update_sharded(value, value.grad, group)

    def _update_sharded(self, value: DTensor, gradient: DTensor, group: dict[str, Any]) -> None:
        state = self.state[value]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1.0 - group["momentum"])
        update: Any = gradient.lerp(state["momentum_buffer"], group["momentum"])  # Nesterov's momentum
        change = nn.Parameter(torch.zeros(value.shape, dtype=value.dtype, device=value.device))
        change.grad = update.full_tensor()
        names = ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
        settings = {name: group[name] for name in names}
        torch.optim.Muon([change], momentum=0.0, weight_decay=0.0, **settings).step()
        whole = DTensor.from_local(change.detach(), value.device_mesh, [Replicate()] * value.device_mesh.ndim)
        value.mul_(1.0 - group["lr"] * group["weight_decay"])
        value.add_(whole.redistribute(placements=value.placements))  # each process takes its rows; no communication


def _adamw(parameters: Named, network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameter_groups(parameters, config),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        **_implementation(network),
    )


def _implementation(network: nn.Module) -> dict[str, bool]:
    # The fused kernel needs no temporaries; foreach has one of the parameters' size.
    is_cuda = all(parameter.is_cuda for parameter in network.parameters())
    return {"fused": True} if is_cuda else {"foreach": True}


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups parameters by the factor of their learning rate: that of the first prefix of their name, else 1.

    Each group has "params", "lr" and "learning_rate_factor".
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters:
        factors = (factor for prefix, factor in config.learning_rate_factors if name.startswith(prefix))
        groups.setdefault(next(factors, 1.0), []).append(parameter)
    return [
        {"params": values, "lr": config.learning_rate * factor, "learning_rate_factor": factor}
        for factor, values in groups.items()
    ]


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimizerConfig], list[torch.optim.Optimizer]]] = {
    function.__name__: function for function in (adam, adamw, muon)
}


def build_optimizers(network: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The optimisers of a network's parameters.

    Raises ValueError for an unknown optimiser, for settings that it does not take, for a prefix in learning_rate_factors
    that no parameter has, or if the optimisers do not update every parameter once.
    """
    names = [name for name, _ in network.named_parameters()]
    for prefix, _ in config.learning_rate_factors:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(
                f"no parameter's name starts with {prefix!r} (optimizer.learning_rate_factors); some names: "
                f"{', '.join(names[:5])}"
            )
    if config.name not in OPTIMIZERS and ":" not in config.name:
        raise ValueError(
            f"optimizer.name must be one of {', '.join(OPTIMIZERS)} or a module:function, but got {config.name!r}"
        )
    function = OPTIMIZERS[config.name] if config.name in OPTIMIZERS else resolve(config.name)
    optimizers = list(function(network, config))
    updated = Counter(
        id(value) for optimizer in optimizers for group in optimizer.param_groups for value in group["params"]
    )
    for name, value in network.named_parameters():
        if value.requires_grad and updated[id(value)] != 1:
            raise ValueError(
                f"optimizer {config.name} must update every parameter once, but updates {name} {updated[id(value)]} times"
            )
    return optimizers

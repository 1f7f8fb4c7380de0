"""Checks of numbers on one device: the authors' values, du/dt, passes, compilation, wrappers and determinism."""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from report import Figure, Setup
from step import CHANNELS, CLASSES, GUIDED, IDENTITY, fresh_state, make_batch, relative, run_loss
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

from meanflow_core.autoencoder import allow_tf32, forbid_tf32
from meanflow_core.config import DiTConfig, ImprovedDiTConfig, MeanFlowConfig, TrainingConfig
from meanflow_core.networks.building import build_network
from meanflow_core.networks.interface import Conditioning, NetworkModel
from meanflow_core.objectives.interface import build_objective
from meanflow_core.sharding import OLDEST_TORCH, shard_network
from meanflow_core.training import Batch, compile_blocks, train_step
from tests.golden_check import BOUND, GOLDEN_FOLDER, check, load

PRECISIONS = ("float32", "tf32", "bfloat16")
SIZE = 8  # of the latents whose du/dt is compared
UNGUIDED = MeanFlowConfig()  # its tangent does not depend on the network


@contextlib.contextmanager
def at_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Products in float32, in TF32, or in bfloat16 by autocast."""
    (allow_tf32 if precision == "tf32" else forbid_tf32)()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        forbid_tf32()


def golden(setup: Setup) -> Iterator[Figure]:
    """The largest relative error against the authors' numbers, of every output and gradient."""
    for precision in PRECISIONS:
        with at_precision(precision, setup.device):
            files = [check(load(path), device=setup.device) for path in sorted(GOLDEN_FOLDER.glob("*.npz"))]
        largest = max(error for errors in files for error in errors.values())
        yield Figure(f"five files, {precision}", largest, limit=BOUND if precision == "float32" else None)


def u_and_dudt(network: NetworkModel, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """u and du/dt of eight samples, in float64."""
    generator = torch.Generator().manual_seed(2)
    z, tangent = torch.randn(2, 8, CHANNELS, SIZE, SIZE, generator=generator).to(device, dtype)
    t = torch.linspace(0.2, 1.0, 8, device=device, dtype=dtype)
    conditioning = Conditioning(
        t=t,
        r=t / 2,
        labels=torch.arange(8, device=device),
        omega=1.0 + t,
        guidance_interval_start=torch.zeros_like(t),
        guidance_interval_end=t,
    )
    with torch.no_grad():
        output = network(z, conditioning, tangent)
    assert output.dudt is not None
    return output.average_velocity.double(), output.dudt.double()


def derivative(setup: Setup) -> Iterator[Figure]:
    """Errors of u and of du/dt against float64, by precision and depth."""
    width = 64 if setup.is_toy else 384
    for depth in (2, 4) if setup.is_toy else (4, 12, 28):
        configs = {
            "DiT": DiTConfig(hidden_size=width, depth=depth, num_heads=4),
            "improved": ImprovedDiTConfig(hidden_size=width, depth=depth, num_heads=4, aux_head_depth=depth // 4),
        }
        for kind, config in configs.items():
            network = build_network(config, sample_size=SIZE, in_channels=CHANNELS, num_classes=CLASSES)
            network = perturb(network).to(setup.device)
            exact = u_and_dudt(copy.deepcopy(network).double(), setup.device, torch.float64)
            for precision in PRECISIONS:
                with at_precision(precision, setup.device):
                    found = u_and_dudt(network, setup.device, torch.float32)
                of_u, of_dudt = (relative(ours, theirs) for ours, theirs in zip(found, exact, strict=True))
                yield Figure(f"{kind}, depth {depth}, {precision}: error of u", of_u)
                yield Figure(f"{kind}, depth {depth}, {precision}: du/dt's over u's", of_dudt / of_u, "times", 2.0)


def perturb(network: NetworkModel) -> NetworkModel:
    """Adds noise to every parameter in place, so that no layer is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def small_training(setup: Setup) -> TrainingConfig:
    """A training of a small network."""
    sizes = {"hidden_size": 64, "depth": 2} if setup.is_toy else {"hidden_size": 384, "depth": 6}
    return TrainingConfig(network=DiTConfig(patch_size=4, num_heads=4, **sizes), loss=GUIDED, ema_decays=(0.9,))


def gradient(network: Callable, plain: NetworkModel, batch: Batch) -> torch.Tensor:
    """The gradient of the guided loss, as one vector. network: `plain` or its wrapper."""
    plain.zero_grad(set_to_none=True)
    build_objective(GUIDED).loss(
        network, plain, batch.moments[:, :CHANNELS], batch.labels, batch.record,
        null_label=CLASSES, global_num_rows=len(batch.labels),
    ).loss.backward()  # fmt: skip
    gradients = [parameter.grad for parameter in plain.parameters() if parameter.grad is not None]
    full = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in gradients]
    return torch.cat([value.flatten() for value in full])


def passes(setup: Setup) -> Iterator[Figure]:
    """du/dt from the training forward against du/dt from a forward of its own."""
    forbid_tf32()
    state = fresh_state(small_training(setup), setup.device.type)
    batch = make_batch(UNGUIDED, 16, setup.device.type)
    one, two = (run_loss(state.network, batch, UNGUIDED, separate=separate) for separate in (False, True))
    yield Figure("du/dt, one pass against two", relative(one.dudt, two.dudt), limit=1e-5)
    yield Figure("loss, one pass against two", relative(one.loss.detach(), two.loss.detach()), limit=1e-5)


def compilation(setup: Setup) -> Iterator[Figure]:
    """The gradient of compiled blocks against that of plain ones, over the difference that the precision makes."""
    backend = "aot_eager" if setup.is_toy else "inductor"
    batch = make_batch(GUIDED, 16, setup.device.type)
    for precision in PRECISIONS:
        state = fresh_state(small_training(setup), setup.device.type)
        with at_precision(precision, setup.device):
            plain = gradient(state.network, state.network, batch)
            compile_blocks(state.network, backend=backend)
            compiled = gradient(state.network, state.network, batch)
        limit = {"float32": 1e-5, "tf32": 1e-2, "bfloat16": 3e-2}[precision]
        yield Figure(f"gradient, compiled against plain, {precision}", relative(compiled, plain), limit=limit)


def wrappers(setup: Setup) -> Iterator[Figure]:
    """Gradients under DDP and FSDP2 on one rank, over NCCL (gloo on a CPU)."""
    forbid_tf32()
    batch = make_batch(GUIDED, 16, setup.device.type)
    config = small_training(setup)
    plain = fresh_state(config, setup.device.type).network
    expected = gradient(plain, plain, batch)
    backend = "nccl" if setup.device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            network = fresh_state(config, setup.device.type).network
            wrapped = DistributedDataParallel(network, forward_sync_buffers=False, gradient_as_bucket_view=True)
            yield Figure(
                f"gradient, DDP over {backend}", relative(gradient(wrapped, network, batch), expected), limit=1e-6
            )
            if TorchVersion(torch.__version__) >= OLDEST_TORCH:
                network = fresh_state(config, setup.device.type).network
                shard_network(network)
                found = relative(gradient(network, network, batch), expected)
                yield Figure(f"gradient, FSDP2 over {backend}", found, limit=1e-6)
        finally:
            dist.destroy_process_group()


def determinism(setup: Setup) -> Iterator[Figure]:
    """Parameters that differ between two runs of five steps with deterministic kernels."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for precision in ("float32", "bfloat16"):
            config, results = replace(small_training(setup), precision=precision), []
            for _ in range(2):
                state = fresh_state(config, setup.device.type)
                for step in range(5):
                    batch = make_batch(GUIDED, 16, setup.device.type, step)
                    train_step(state, state.network, [batch], IDENTITY, config)
                results.append(torch.cat([value.detach().flatten() for value in state.network.parameters()]))
            different = int((results[0] != results[1]).sum())
            yield Figure(f"parameters that differ after 5 steps, {precision}", different, limit=0)
    finally:
        torch.use_deterministic_algorithms(False)


PARTS = {
    "The authors' numbers": golden,
    "du/dt by precision and depth": derivative,
    "One pass against two": passes,
    "Compiled against plain": compilation,
    "DDP and FSDP2": wrappers,
    "Bit for bit": determinism,
}

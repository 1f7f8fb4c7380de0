"""GPUs and clusters in numbers: what makers publish, and what is assumed where nothing was measured."""

from dataclasses import dataclass
from math import ceil

# CUDA's context and its libraries' workspaces, and NCCL's buffers: about 1 GB each.
RESERVED_BYTES = 2e9
# Of a GPU's memory, what the allocator's rounding and gaps leave unused.
FRAGMENTED_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as its maker's data sheet has it."""

    name: str
    """In words."""
    memory_bytes: float
    """Its memory."""
    memory_tbyte: float
    """TB/s of its memory."""
    peak_teraflops: dict[str, float]
    """{precision: TFLOP/s} of dense products of matrices: no sparsity."""
    link_gbyte: float
    """GB/s in one direction to the other GPUs of its node; half of what data sheets give for both directions."""

    @property
    def usable_bytes(self) -> float:
        """What a training may take of its memory."""
        return self.memory_bytes * (1.0 - FRAGMENTED_SHARE) - RESERVED_BYTES


# NVIDIA's data sheets. Where a sheet counts sparsity, half of it.
_HOPPER = {"bfloat16": 989.0, "tf32": 494.0, "float32": 67.0}
_AMPERE = {"bfloat16": 312.0, "tf32": 156.0, "float32": 19.5}
GPUS = {
    "h200": Gpu(name="H200 SXM", memory_bytes=141e9, memory_tbyte=4.8, peak_teraflops=_HOPPER, link_gbyte=450.0),
    "h100": Gpu(name="H100 SXM", memory_bytes=80e9, memory_tbyte=3.35, peak_teraflops=_HOPPER, link_gbyte=450.0),
    "a100": Gpu(name="A100 SXM, 80 GB", memory_bytes=80e9, memory_tbyte=2.04, peak_teraflops=_AMPERE, link_gbyte=300.0),
    "a100-40": Gpu(
        name="A100 SXM, 40 GB", memory_bytes=40e9, memory_tbyte=1.56, peak_teraflops=_AMPERE, link_gbyte=300.0
    ),
    # No NVLink: PCIe 4.0 x16, and through the host's memory, so that half of its 32 GB/s are left.
    "l4": Gpu(
        name="L4",
        memory_bytes=24e9,
        memory_tbyte=0.3,
        peak_teraflops={"bfloat16": 121.0, "tf32": 60.0, "float32": 30.3},
        link_gbyte=16.0,
    ),
}

# A step is products of matrices, at a share of the peak, and all the rest, at the pace of the memory. The share is a guess.
# The rest, in bytes per floating-point operation of the products, is what makes of it the published DiT-XL/2 in bfloat16:
# 1.3 steps/s of 8 x 128 images on 8 H800 (github.com/hpcaitech/Open-Sora, docs/speed.md at e3cb99d), 119 TFLOP/s a GPU of a
# peak of 989 and a memory of 3.35 TB/s.
SHARE_OF_PEAK = 0.6
BYTES_PER_FLOP = 3.35 * (1.0 / 119.0 - 1.0 / (SHARE_OF_PEAK * 989.0))
# Of a link's rate, what NCCL's collectives reach: a guess.
SHARE_OF_LINK = 0.75


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines that are alike, and what each of their parts sustains."""

    gpu: Gpu
    """Of which kind."""
    gpus_per_node: int
    """G."""
    teraflops: float | None
    """TFLOP/s of `step_flops` that a GPU sustains over whole steps, where that was measured: what `pipelines.train` logs
    as model_flops_per_second, over W and 10^12. None takes the peaks and `SHARE_OF_PEAK`."""
    link_gbyte: float
    """GB/s in one direction that collectives reach between the GPUs of a node."""
    network_gbit: float
    """Gbit/s in one direction that collectives reach between one node and the others."""
    storage_gbyte: float
    """GB/s between one node and the storage of latents and checkpoints."""
    price_per_gpu_hour: float | None
    """In whatever currency."""

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "teraflops", "link_gbyte", "network_gbit", "storage_gbyte", "price_per_gpu_hour"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0, but got {value}")

    def num_nodes(self, num_gpus: int) -> int:
        """N. Raises ValueError for nodes of which one would not be full."""
        if num_gpus < 1:
            raise ValueError(f"gpus must be at least 1, but got {num_gpus}")
        if num_gpus > self.gpus_per_node and num_gpus % self.gpus_per_node:
            raise ValueError(
                f"gpus must be at most gpus_per_node = {self.gpus_per_node} or a multiple of it, but got {num_gpus}; "
                f"take {num_gpus // self.gpus_per_node * self.gpus_per_node}, or name another --gpus-per-node"
            )
        return ceil(num_gpus / self.gpus_per_node)

    def sustained_teraflops(self, precision: str) -> float:
        """TFLOP/s of a GPU as assumed from its peak and its memory."""
        products = 1.0 / (SHARE_OF_PEAK * self.gpu.peak_teraflops[precision])
        return 1.0 / (products + BYTES_PER_FLOP / self.gpu.memory_tbyte)

"""Specifications of GPUs and clusters: from data sheets, and assumed where nothing was measured."""

from dataclasses import dataclass
from math import ceil

RESERVED_BYTES = 2e9  # the CUDA context with its libraries, and NCCL's buffers: about 1 GB each
FRAGMENTATION = 0.05  # fraction of a GPU's memory that the allocator cannot use


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, from its data sheet."""

    name: str
    memory_bytes: float
    memory_tbyte: float
    """Memory bandwidth in TB/s."""
    peak_teraflops: dict[str, float]
    """{precision: TFLOP/s} of dense matrix products, without sparsity."""
    link_gbyte: float
    """GB/s in one direction to the other GPUs of a node; data sheets give the sum of both directions."""

    @property
    def usable_bytes(self) -> float:
        """Memory available for training."""
        return self.memory_bytes * (1.0 - FRAGMENTATION) - RESERVED_BYTES


# Source: NVIDIA's data sheets; figures with sparsity are halved.
_HOPPER = {"bfloat16": 989.0, "tf32": 494.0, "float32": 67.0}
_AMPERE = {"bfloat16": 312.0, "tf32": 156.0, "float32": 19.5}
_LOVELACE = {"bfloat16": 121.0, "tf32": 60.0, "float32": 30.3}
GPUS = {
    key: Gpu(name=name, memory_bytes=gigabytes * 1e9, memory_tbyte=tbyte, peak_teraflops=peak, link_gbyte=link)
    for key, name, gigabytes, tbyte, peak, link in (
        ("h200", "H200 SXM", 141, 4.8, _HOPPER, 450.0),
        ("h100", "H100 SXM", 80, 3.35, _HOPPER, 450.0),
        ("a100", "A100 SXM, 80 GB", 80, 2.04, _AMPERE, 300.0),
        ("a100-40", "A100 SXM, 40 GB", 40, 1.56, _AMPERE, 300.0),
        # No NVLink: PCIe 4.0 x16 through host memory, which leaves half of its 32 GB/s.
        ("l4", "L4", 24, 0.3, _LOVELACE, 16.0),
    )
}

# A step is modelled as matrix products at a fraction of the peak, plus everything else at memory bandwidth. The fraction is a
# guess. Everything else, in bytes per floating-point operation, is calibrated on one published run: DiT-XL/2 in bfloat16, 1.3
# steps/s of 8 x 128 images on 8 H800 (119 TFLOP/s per GPU; peak 989, 3.35 TB/s).
# Source: github.com/hpcaitech/Open-Sora, docs/speed.md at e3cb99d.
PEAK_FRACTION = 0.6
BYTES_PER_FLOP = 3.35 * (1.0 / 119.0 - 1.0 / (PEAK_FRACTION * 989.0))
LINK_FRACTION = 0.75  # fraction of a link's rate that NCCL's collectives reach: a guess


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Identical nodes and their sustained rates.

    Raises ValueError for rates that are not positive and finite.
    """

    gpu: Gpu
    gpus_per_node: int
    teraflops: float | None
    """Measured TFLOP/s per GPU over whole steps, in `step_flops`; None assumes a rate from the data sheet."""
    link_gbyte: float
    """GB/s in one direction that collectives reach between GPUs of a node."""
    network_gbit: float
    """Gbit/s in one direction that collectives reach between nodes."""
    storage_gbyte: float
    """GB/s between a node and the storage of latents and checkpoints."""
    price_per_gpu_hour: float | None
    """Price in any currency; None omits the cost."""

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "teraflops", "link_gbyte", "network_gbit", "storage_gbyte", "price_per_gpu_hour"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0, but got {value}")

    def num_nodes(self, num_gpus: int) -> int:
        """Nodes that hold this number of GPUs. Raises ValueError for a partly filled node."""
        if num_gpus < 1:
            raise ValueError(f"gpus must be at least 1, but got {num_gpus}")
        if num_gpus > self.gpus_per_node and num_gpus % self.gpus_per_node:
            raise ValueError(
                f"gpus must be at most gpus_per_node = {self.gpus_per_node} or a multiple of it, but got {num_gpus}; "
                f"use {num_gpus // self.gpus_per_node * self.gpus_per_node}, or set --gpus-per-node"
            )
        return ceil(num_gpus / self.gpus_per_node)

    def sustained_teraflops(self, precision: str) -> float:
        """TFLOP/s per GPU, assumed from its peak and its memory bandwidth."""
        products = 1.0 / (PEAK_FRACTION * self.gpu.peak_teraflops[precision])
        return 1.0 / (products + BYTES_PER_FLOP / self.gpu.memory_tbyte)

"""GPUs from their data sheets, and clusters with measured or assumed rates."""

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

# A step is modelled as matrix products at a fraction of the peak, plus all other operations at memory bandwidth. The fraction
# is a guess. The other operations' bytes per FLOP are calibrated on one published run: DiT-XL/2 in bfloat16, 1.3 steps/s of
# 8 x 128 images on 8 H800 (119 TFLOP/s per GPU; peak 989 TFLOP/s, 3.35 TB/s).
# Source: github.com/hpcaitech/Open-Sora, docs/speed.md at e3cb99d.
PEAK_FRACTION = 0.6
BYTES_PER_FLOP = 3.35 * (1.0 / 119.0 - 1.0 / (PEAK_FRACTION * 989.0))
LINK_FRACTION = 0.75  # fraction of a link's rate that NCCL's collectives reach: a guess


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Identical nodes and their sustained rates.

    Raises ValueError for an unknown GPU, and for rates that are not positive and finite.
    """

    gpus_per_node: int = 8
    """GPUs per node."""
    gpu: str = "h100"
    """Kind of GPU: h200, h100, a100, a100-40 or l4."""
    teraflops: float | None = None
    """Measured TFLOP/s per GPU over whole steps: model_flops_per_second of a trial run in MLflow / number of GPUs / 10^12.
    Default: assumed from the GPU's peak and memory bandwidth."""
    link_gbyte: float | None = None
    """GB/s in one direction that collectives reach between GPUs of a node. Default: three quarters of the data sheet's."""
    network_gbit: float = 100.0
    """Gbit/s in one direction that collectives reach between nodes. Plain TCP: 100; EFA and InfiniBand: 400 to 3,200."""
    storage_gbyte: float = 1.0
    """GB/s between a node and the storage of latents and checkpoints."""
    price_per_gpu_hour: float | None = None
    """Price of a GPU hour, in any currency. Default: no cost is printed."""

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ValueError(
                f"gpu must be one of {', '.join(GPUS)}, but got {self.gpu!r}; for another GPU, choose one with as much "
                f"memory and set --teraflops and --link-gbyte"
            )
        for name in ("gpus_per_node", "teraflops", "link_gbyte", "network_gbit", "storage_gbyte", "price_per_gpu_hour"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0 and finite, but got {value}")

    @property
    def data_sheet(self) -> Gpu:
        """The data sheet of the GPU."""
        return GPUS[self.gpu]

    @property
    def sustained_link_gbyte(self) -> float:
        """`link_gbyte` or its default."""
        return LINK_FRACTION * self.data_sheet.link_gbyte if self.link_gbyte is None else self.link_gbyte

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
        products = 1.0 / (PEAK_FRACTION * self.data_sheet.peak_teraflops[precision])
        return 1.0 / (products + BYTES_PER_FLOP / self.data_sheet.memory_tbyte)

"""Configurations of networks."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from meanflow_core.config.rules import POSITIVE, POSITIVE_INTEGER, check, require


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Base of the networks' configurations: the fields are arguments of the network's class.

    The class also gets sample_size, in_channels and num_classes, which come from the data. It is either a network of
    this package, or any torch.nn.Module whose forward takes (z, t, t - r, labels); see `networks.forward_mode`.
    """

    network: ClassVar[str] = ""
    """The network's class, as "module:Class"."""
    has_velocity_head: ClassVar[bool] = False
    """Whether the network has a v head, and guidance as an input, as improved MeanFlow requires."""

    @property
    def block_counts(self) -> tuple[int, ...]:
        """Number of equal blocks of each kind; empty if unknown. The costs of deep networks are extrapolated by them."""
        return ()

    def with_block_counts(self, counts: tuple[int, ...]) -> Self:
        """A configuration with other `block_counts`."""
        assert not counts, "override this method together with block_counts"
        return self


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(NetworkConfig):
    """What the transformers share."""

    patch_size: int = 2
    """Side of a patch in latent pixels; a 32x32 latent has (32 / patch_size)^2 tokens."""
    hidden_size: int = 768
    """Width of a token."""
    depth: int = 12
    """Number of transformer blocks from the input to each output."""
    num_heads: int = 12
    """Attention heads; must divide hidden_size."""
    mlp_ratio: float = 4.0
    """Width of the feed-forward layer, as a multiple of hidden_size."""

    def __post_init__(self) -> None:
        check(self, "network.", POSITIVE_INTEGER, "patch_size", "hidden_size", "depth", "num_heads")
        check(self, "network.", POSITIVE, "mlp_ratio")
        require(
            self.hidden_size % self.num_heads == 0,
            f"network.hidden_size must be a multiple of num_heads, but got {self.hidden_size} and {self.num_heads}",
        )


@dataclass(frozen=True, kw_only=True)
class DiTConfig(TransformerConfig):
    """A DiT: adaptive layer norms conditioned on (t, t - r, label). DiT's Table 1 has the sizes S to XL."""

    network: ClassVar[str] = "meanflow_core.networks.dit:MeanFlowDiT"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.hidden_size % 4 == 0,
            f"network.hidden_size must be a multiple of 4 (sine-cosine positions), but got {self.hidden_size}",
        )

    @property
    def block_counts(self) -> tuple[int, ...]:
        """See `NetworkConfig.block_counts`."""
        return (self.depth,)

    def with_block_counts(self, counts: tuple[int, ...]) -> Self:
        """See `NetworkConfig.with_block_counts`."""
        return replace(self, depth=counts[0])


@dataclass(frozen=True, kw_only=True)
class ImprovedDiTConfig(TransformerConfig):
    """Improved MeanFlow's network, with conditioning tokens and a v head."""

    network: ClassVar[str] = "meanflow_core.networks.improved_dit:ImprovedMeanFlowDiT"
    has_velocity_head: ClassVar[bool] = True

    mlp_ratio: float = 8 / 3
    """Width of the feed-forward layer, as a multiple of hidden_size."""
    aux_head_depth: int = 8
    """Number of blocks in each of the two heads; the shared trunk has depth - aux_head_depth blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.aux_head_depth <= self.depth,
            f"network.aux_head_depth must lie in [0, depth = {self.depth}], but got {self.aux_head_depth}",
        )
        require(
            self.hidden_size // self.num_heads % 2 == 0,
            f"network.hidden_size / num_heads must be even (rotary positions), "
            f"but got {self.hidden_size} and {self.num_heads}",
        )

    @property
    def block_counts(self) -> tuple[int, ...]:
        """See `NetworkConfig.block_counts`."""
        return self.depth - self.aux_head_depth, self.aux_head_depth

    def with_block_counts(self, counts: tuple[int, ...]) -> Self:
        """See `NetworkConfig.with_block_counts`."""
        return replace(self, depth=sum(counts), aux_head_depth=counts[1])

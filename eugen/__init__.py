"""Cheap feed-forward layers that keep the quality of the dense ones, on any PyTorch model."""

from eugen.ffn import DenseFFN, FFNLayer, LayerConfig, UnsuitableBlock
from eugen.layers import layers
from eugen.layers.dense import DenseConfig
from eugen.layers.eugen import EUGenConfig
from eugen.layers.linear import LinearConfig
from eugen.layers.low_rank import LowRankConfig
from eugen.layers.low_rank_aware import LowRankAwareConfig
from eugen.layers.narrow import NarrowConfig
from eugen.layers.prune import PruneConfig
from eugen.layers.snnk import SNNKConfig
from eugen.sites import FFNParts, FFNSite, find_ffns, register_site
from eugen.surgery import ReplacedSite, Replacement, replace

__all__ = [
    "DenseConfig",
    "DenseFFN",
    "EUGenConfig",
    "FFNLayer",
    "FFNParts",
    "FFNSite",
    "LayerConfig",
    "LinearConfig",
    "LowRankAwareConfig",
    "LowRankConfig",
    "NarrowConfig",
    "PruneConfig",
    "ReplacedSite",
    "Replacement",
    "SNNKConfig",
    "UnsuitableBlock",
    "find_ffns",
    "layers",
    "register_site",
    "replace",
]

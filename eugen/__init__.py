"""Cheap feed-forward layers that keep the quality of the dense ones, on any PyTorch model."""

from eugen.bundle import bundle, merge, merge_linear
from eugen.compression.compress import Compressed, compress
from eugen.compression.levels import LEVELS, Level
from eugen.compression.saved import load, save
from eugen.config import BudgetTooSmall, LayerConfig, UnsuitableBlock
from eugen.ffn import DenseFFN, FFNLayer
from eugen.layers import layers
from eugen.layers.bf16 import Bf16Config
from eugen.layers.block_dense import BlockDenseConfig
from eugen.layers.block_shuffle import BlockShuffleConfig
from eugen.layers.dense import DenseConfig
from eugen.layers.dlrt import DLRTConfig
from eugen.layers.eugen import EUGenConfig
from eugen.layers.eugen_experts import EUGenExpertsConfig
from eugen.layers.fff import FFFConfig
from eugen.layers.ffsplit import FFSplitConfig
from eugen.layers.int8 import Int8Config
from eugen.layers.linear import LinearConfig
from eugen.layers.low_rank import LowRankConfig
from eugen.layers.low_rank_aware import LowRankAwareConfig
from eugen.layers.moe import MoEConfig
from eugen.layers.narrow import NarrowConfig
from eugen.layers.narrow_gated import NarrowGatedConfig
from eugen.layers.prune import PruneConfig
from eugen.layers.prune_linear import PruneLinearConfig
from eugen.layers.snnk import SNNKConfig
from eugen.plan import Plan
from eugen.polynomials import Polynomial, bernstein, fit_polynomial
from eugen.search.target import Target
from eugen.self_guided import SelfGuided
from eugen.sites import FFNParts, FFNSite, find_ffns, register_site
from eugen.surgery import FittedBlock, ReplacedSite, Replacement, map_layers, replace

__all__ = [
    "LEVELS",
    "Bf16Config",
    "BlockDenseConfig",
    "BlockShuffleConfig",
    "BudgetTooSmall",
    "Compressed",
    "DLRTConfig",
    "DenseConfig",
    "DenseFFN",
    "EUGenConfig",
    "EUGenExpertsConfig",
    "FFFConfig",
    "FFNLayer",
    "FFNParts",
    "FFNSite",
    "FFSplitConfig",
    "FittedBlock",
    "Int8Config",
    "LayerConfig",
    "Level",
    "LinearConfig",
    "LowRankAwareConfig",
    "LowRankConfig",
    "MoEConfig",
    "NarrowConfig",
    "NarrowGatedConfig",
    "Plan",
    "Polynomial",
    "PruneConfig",
    "PruneLinearConfig",
    "ReplacedSite",
    "Replacement",
    "SNNKConfig",
    "SelfGuided",
    "Target",
    "UnsuitableBlock",
    "bernstein",
    "bundle",
    "compress",
    "find_ffns",
    "fit_polynomial",
    "layers",
    "load",
    "map_layers",
    "merge",
    "merge_linear",
    "register_site",
    "replace",
    "save",
]

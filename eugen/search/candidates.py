"""What may take a block's place: methods, and the sizes at which each is looked at."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from eugen.config import BudgetTooSmall, LayerConfig, UnsuitableBlock
from eugen.ffn import DenseFFN
from eugen.layers.dense import DenseConfig
from eugen.layers.eugen import EUGenConfig
from eugen.layers.eugen_experts import EUGenExpertsConfig
from eugen.layers.ffsplit import FFSplitConfig
from eugen.layers.linear import LinearConfig
from eugen.layers.low_rank_aware import LowRankAwareConfig
from eugen.layers.prune import PruneConfig
from eugen.layers.prune_linear import PruneLinearConfig

BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Fractions of the block's MACs at which a method without a size of its own is looked at."""
Candidate = LayerConfig | Callable[[DenseFFN, float], LayerConfig]
"""A configuration without a budget, or what makes one of a block and a budget."""


@dataclass(frozen=True)
class Sized:
    """A candidate at one size, and what it costs.

    Attributes:
        budget: the one asked for; for a method of one size its own share of the dense MACs.
        macs, parameters: of one token at inference; stored.
    """

    candidate: str
    budget: float
    config: LayerConfig
    macs: int
    parameters: int


def defaults(dense: DenseFFN) -> dict[str, Candidate]:
    """The candidates for a block of this form by name; what does not suit it is skipped.

    An EUGen of order 1 on teacher rows with the block's own activation is not among them: in closed form it
    is `prune`. `univariate` starts at GELU, so it differs for other activations only.
    """
    teacher = {"projection": "teacher", "norm_slot": False}
    known: dict[str, Candidate] = {
        "drop": PruneConfig(hidden_features=1),  # the mean of the outputs, and one neuron
        "prune": PruneConfig(),
        "linear": LinearConfig(),
        "prune + linear": _beside_a_linear_map,
        "low_rank_aware": LowRankAwareConfig(),
        "prune_linear": PruneLinearConfig(),
        "eugen_experts": EUGenExpertsConfig(),
        "eugen_teacher": EUGenConfig(order=2, sharing="powers", direct_linear=True, **teacher),
    }
    if dense.gate is not None:
        known["eugen_product"] = EUGenConfig(order=2, min_order=2, **teacher)
    elif not isinstance(dense.act, nn.GELU):
        known["eugen_univariate"] = EUGenConfig(order=1, activation="univariate", **teacher)
    return known


def candidates_for(dense: DenseFFN, given: Sequence[LayerConfig] | None) -> dict[str, Candidate]:
    """Those given, by names of their own, or the default ones.

    Raises:
        ValueError: one names a budget.
    """
    if given is None:
        return defaults(dense)
    found: dict[str, Candidate] = {}
    for config in given:
        if config.budget is not None:
            raise ValueError(
                f"candidate {config.name!r} has budget={config.budget}: leave it out, the search gives sizes"
            )
        name, number = label(config), 2
        while name in found:
            name, number = f"{label(config)} {number}", number + 1
        found[name] = config
    return found


def label(config: LayerConfig) -> str:
    """What people read: the method, and the one inside it."""
    inner = getattr(config, "of", None)
    return f"{config.name}({label(inner)})" if isinstance(inner, LayerConfig) else config.name


def sizes(dense: DenseFFN, candidates: Mapping[str, Candidate]) -> dict[str, list[Sized]]:
    """Each candidate that suits the block at each size that asks no more MACs than it, the smallest first.

    Raises:
        ValueError: a candidate refuses the block for another reason than its form or the size.
    """
    empty = copy.deepcopy(dense).to("meta")
    found = {}
    for name, candidate in candidates.items():
        if isinstance(candidate, DenseConfig):
            continue  # `kept`
        found_sizes = [each for each in _sizes(empty, name, candidate) if each.macs <= empty.macs_per_token]
        distinct = {each.macs: each for each in reversed(found_sizes)}  # two budgets may buy the same
        if distinct:
            found[name] = sorted(distinct.values(), key=lambda each: each.macs)
    return found


def kept(dense: DenseFFN) -> Sized:
    """The block itself."""
    return Sized("dense", 1.0, DenseConfig(), dense.macs_per_token, dense.num_parameters())


def _sizes(empty: DenseFFN, name: str, candidate: Candidate) -> list[Sized]:
    """At every budget that buys something; a configuration that builds without a budget has one size."""
    if isinstance(candidate, LayerConfig):
        try:
            return [_sized(empty, name, candidate, None)]
        except UnsuitableBlock:
            return []
        except ValueError:  # it needs a budget; any other reason comes up again with one
            pass
    found = []
    for budget in BUDGETS:
        try:
            if isinstance(candidate, LayerConfig):
                config = replace(candidate, budget=budget)
            else:
                config = candidate(empty, budget)
            found.append(_sized(empty, name, config, budget))
        except (UnsuitableBlock, BudgetTooSmall):
            continue
    return found


def _sized(empty: DenseFFN, name: str, config: LayerConfig, budget: float | None) -> Sized:
    layer = config.build(empty, generator=torch.Generator())
    macs, parameters = layer.macs_per_token, layer.num_parameters()
    return Sized(name, macs / empty.macs_per_token if budget is None else budget, config, macs, parameters)


def _beside_a_linear_map(dense: DenseFFN, budget: float) -> LayerConfig:
    """The strongest neurons and a full linear map of the inputs, solved together."""
    whole = FFSplitConfig(budget=budget, of=LinearConfig())
    whole.require_down(dense)
    neurons = whole.size_for(
        dense, dense.macs_per_neuron, dense.in_features * dense.out_features, unit="neurons"
    )
    # Halfway to the next number, so that rounding the share down gives this one.
    return FFSplitConfig(of=LinearConfig(), heavy=(neurons + 0.5) / dense.hidden_features)

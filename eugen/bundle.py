"""Merging and bundling of consecutive layers (SNNK, ICLR 2024, openreview 4iPw1klFWa, section on bundling).

A layer that ends in a linear map takes up the linear map that follows it, exactly (`merge`). A whole stack of
feed-forward layers becomes one layer `A f(x) + c`, fitted in closed form to the stack's outputs or to
targets (`bundle`). `docs/bundling.md` has the derivation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eugen.config import LayerConfig, UnsuitableBlock
from eugen.cost import count_macs
from eugen.ffn import DenseFFN, FFNLayer, new_linear
from eugen.shapes import Float


@torch.no_grad()
def merge_linear(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """`x ↦ second(first(x))` as one linear map: `W = W₂ W₁`, `b = W₂ b₁ + b₂`, multiplied in float64.

    Device and dtype are those of `first`; without a bias in either there is none.

    Raises:
        ValueError: the shapes do not chain.
    """
    if first.out_features != second.in_features:
        raise ValueError(
            f"first.out_features={first.out_features} must equal second.in_features={second.in_features}"
        )
    like, left = first.weight, second.weight.double()
    bias = None if second.bias is None else second.bias.double()
    if first.bias is not None:
        bias = left @ first.bias.double() + (0 if bias is None else bias)
    merged = nn.Linear(first.in_features, second.out_features, bias=bias is not None, device="meta")
    merged = merged.to(like.dtype).to_empty(device=like.device)
    merged.weight.copy_(left @ like.double())
    if bias is not None:
        merged.bias.copy_(bias)
    return merged


def merge(layer: FFNLayer, following: nn.Linear) -> FFNLayer:
    """A copy of the layer that computes `following(layer(x))` in its own last linear map.

    Raises:
        ValueError: the layer does not end in one plain linear map, or the shapes do not chain.
    """
    given = layer.merged()
    merged = copy.deepcopy(given)
    readout = merged.readout
    if type(readout) is nn.Linear and any(module is readout for module in merged.modules()):
        joint = merge_linear(readout, following).requires_grad_(readout.weight.requires_grad)
        # In place: whatever else in the layer refers to its readout goes on seeing the right one.
        readout.weight, readout.bias, readout.out_features = joint.weight, joint.bias, joint.out_features
        for module in merged.modules():
            if isinstance(module, FFNLayer) and module.readout is readout:
                module.out_features = readout.out_features
        if _is_followed(merged, given, following):
            return merged
    raise ValueError(
        f"{type(layer).__name__} does not end in one plain nn.Linear that {following} could be merged into "
        f"(its readout is {readout}): keep both; merge before weights are quantised"
    )


@torch.no_grad()
def _is_followed(merged: FFNLayer, given: FFNLayer, following: nn.Linear) -> bool:
    """Whether the merged layer's outputs are right: a layer may add something to its readout's."""
    like = following.weight
    if like.is_meta:
        return True
    x = torch.randn(16, given.in_features, generator=torch.Generator().manual_seed(0)).to(like)
    expected = following(given.reference(x)).double()
    try:
        error = torch.linalg.vector_norm(merged.reference(x).double() - expected)
    except RuntimeError:  # of shapes
        return False
    allowed = torch.finfo(given.precision).eps ** 0.5
    return bool(error <= allowed * torch.linalg.vector_norm(expected))


def bundle(
    stack: nn.Module | Sequence[nn.Module],
    config: LayerConfig,
    calibration: Iterable[Any],
    *,
    targets: bool = False,
    seed: int = 0,
) -> FFNLayer:
    """One layer in place of a stack of feed-forward layers, or of a whole network, in the stack's mode.

    Its readout is the minimum of the squared error plus ridge over all linear maps of its features.

    Args:
        stack: an `nn.Sequential` (nested ones are opened), one layer, or a sequence of layers; it begins
            with an `nn.Linear` or a `DenseFFN`. It is left as it was, and asked in evaluation mode.
        config: what to build; its budget is a fraction of the MACs of the stack. Rows of the dense layer
            are those of the first layer.
        calibration: re-iterable batches (a list, a DataLoader) of inputs `[..., d]`.
        targets: fit to targets instead of the stack's outputs: batches are then pairs of inputs
            `[..., d]` and targets `[..., l]`.
        seed: for random projections and initialisation; global seeds are not touched.

    Raises:
        ValueError: the stack is empty or does not chain, the budget is too small, or the calibration data
            are empty, of the wrong form, not re-iterable or hold NaN.
        UnsuitableBlock: the configuration cannot take the first layer's form, or learns nothing from data.
    """
    if isinstance(calibration, Iterator):
        raise ValueError(
            "calibration is an iterator that can be read only once, and a fit reads it several times: pass "
            "a list of batches or a DataLoader"
        )
    if not config.needs_calibration:
        raise UnsuitableBlock(f"layer {config.name!r} is made without data: a bundle is fitted to them")
    given = _opened(stack)
    layers = copy.deepcopy(given)
    block = _Stack(layers)
    config.build(copy.deepcopy(block).to("meta"), generator=torch.Generator())  # the size, before any work
    chunks = _Chunks(layers, block, calibration, targets)
    block.fit_readout(chunks)
    layer = config.fit(block, chunks, generator=torch.Generator().manual_seed(seed))
    return layer.train(given[0].training)


class _Stack(DenseFFN):
    """A stack seen as one block, which is what a configuration knows how to replace.

    Its neurons are those of the first layer, its output matrix is what `fit_readout` finds to be the
    best on them; its MACs are those of the stack.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        first = _first_layer(layers)
        up = first.up
        for layer in layers:
            layer.eval()
        token = up.weight.new_zeros(1, up.in_features)
        out_features = _through(layers, token).shape[-1]
        down = new_linear(up.out_features, out_features, like=up.weight, generator=torch.Generator())
        super().__init__(up, first.act, down, first.gate)
        self._macs = count_macs(lambda: _through(layers, token))

    @property
    def macs_per_token(self) -> int:
        return self._macs


class _Chunks:
    """A re-iterable stream `(x [T, d], y [T, l], None)`; the stack runs anew at each reading."""

    def __init__(
        self, layers: list[nn.Module], block: DenseFFN, batches: Iterable[Any], targets: bool
    ) -> None:
        self.layers, self.block, self.batches, self.targets = layers, block, batches, targets

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, None]]:
        empty = True
        for index, batch in enumerate(self.batches):
            empty = False
            x, y = self._pair(batch, index)
            x = self._flat(x, self.block.in_features, f"the inputs of calibration batch {index}")
            y = _through(self.layers, x) if y is None else y
            what = "targets" if self.targets else "stack's outputs"
            y = self._flat(y, self.block.out_features, f"the {what} of calibration batch {index}")
            if len(x) != len(y):
                raise ValueError(f"calibration batch {index} has {len(x)} inputs and {len(y)} targets")
            yield x, y, None
        if empty:
            raise ValueError("the calibration data are empty: give at least one batch")

    def _pair(self, batch: Any, index: int) -> tuple[Tensor, Tensor | None]:
        if not self.targets and isinstance(batch, Tensor):
            return batch, None
        if self.targets and isinstance(batch, (tuple, list)) and len(batch) == 2:
            x, y = batch
            if isinstance(x, Tensor) and isinstance(y, Tensor):
                return x, y
        wanted = (
            "a pair of tensors (inputs, targets), as targets=True says"
            if self.targets
            else "a tensor of inputs; pairs (inputs, targets) need targets=True"
        )
        raise ValueError(f"calibration batch {index} is a {type(batch).__name__} and must be {wanted}")

    def _flat(self, values: Tensor, width: int, what: str) -> Float[Tensor, "t _"]:
        if not values.is_floating_point():
            raise ValueError(f"{what} are {values.dtype}: make them float (classes: one_hot(y).float())")
        if values.ndim < 1 or values.shape[-1] != width:
            raise ValueError(f"{what} have the shape {tuple(values.shape)}: the last size must be {width}")
        if not torch.isfinite(values).all():
            raise ValueError(f"{what} hold NaN or infinity: check the data and the stack's weights")
        return values.detach().reshape(-1, width).to(self.block.up.weight)


def _opened(stack: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """The layers of a stack in their order, out of nested sequences."""
    if isinstance(stack, nn.Module) and not isinstance(stack, (nn.Sequential, nn.ModuleList)):
        return [stack]
    return [layer for part in stack for layer in _opened(part)]


def _first_layer(layers: list[nn.Module]) -> DenseFFN:
    """The first layer with the activation that follows it."""
    if not layers:
        raise ValueError("the stack is empty: give at least one layer")
    first = layers[0]
    if isinstance(first, DenseFFN):
        return first
    if not isinstance(first, nn.Linear):
        raise ValueError(
            f"the stack begins with {type(first).__name__} and must begin with nn.Linear or DenseFFN: bundle "
            "what follows the modules before, and give a module of your own as a list of its layers"
        )
    following = [layer for layer in layers[1:] if not isinstance(layer, (nn.Dropout, nn.Identity))]
    has_activation = following and _is_activation(following[0], first)
    return DenseFFN(first, following[0] if has_activation else nn.Identity())


def _is_activation(module: nn.Module, first: nn.Linear) -> bool:
    """Whether a module acts on each neuron by itself; one with weights is a layer of its own."""
    if any(True for _ in module.parameters()):
        return False
    z = first.weight.detach()[:, :2].T.contiguous()
    try:
        return torch.allclose(module(z.clone())[:, :1], module(z[:, :1].clone()))
    except RuntimeError:  # it wants the width that it was made for
        return False


@torch.no_grad()
def _through(layers: list[nn.Module], x: Float[Tensor, "t d_in"]) -> Float[Tensor, "t d_out"]:
    """The stack's outputs.

    Raises:
        ValueError: a layer does not take what the one before it gives.
    """
    for index, layer in enumerate(layers):
        try:
            y = layer(x)
        except RuntimeError as error:
            raise ValueError(
                f"layer {index} of the stack, {layer}, does not take an input of {x.shape[-1]} features: "
                f"{error}"
            ) from error
        if not (isinstance(y, Tensor) and y.ndim == 2):
            raise ValueError(f"layer {index} of the stack, {layer}, must give one tensor [tokens, features]")
        x = y
    return x

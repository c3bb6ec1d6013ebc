"""What a layer and a model cost: parameters, multiply-accumulates, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eugen.ffn import FFNLayer
from eugen.kernels import feature_map
from eugen.parts import grouped
from eugen.sites import find_ffns


@dataclass(frozen=True)
class ModelCost:
    """Cost of a whole model for one call.

    Attributes:
        params: stored weights (parameters and buffers), shared ones once.
        macs: multiply-accumulates of all matrix products of the call, attention included.
        weight_bytes: bytes that the weights occupy, the least that one call has to read.
        ffn_params, ffn_macs: the feed-forward blocks alone; MACs for one token.
    """

    params: int
    macs: int
    weight_bytes: int
    ffn_params: int
    ffn_macs: int


@dataclass(frozen=True)
class CallCost:
    """What one call asks of any device.

    Attributes:
        macs: multiply-accumulates of its matrix products by the dtype of their operands, as "float32".
        weight_bytes: the weights that it reads, each once; of a table whose rows are looked up, those rows.
        io_bytes: its inputs and its outputs, each once. With the weights the least that has to be moved.
        activation_bytes: what its operators read and write beside weights if each goes to memory by itself.
    """

    macs: dict[str, int]
    weight_bytes: int
    io_bytes: int
    activation_bytes: int

    @property
    def total_macs(self) -> int:
        """Of all dtypes."""
        return sum(self.macs.values())


def _product_flops(a: torch.Size, b: torch.Size, *_: object, **__: object) -> int:
    """Of a product, plain or grouped: each row of a two-dimensional side meets one group only."""
    return 2 * a[-2] * a[-1] * b[-1] * (a[0] if len(a) == len(b) == 3 else 1)


UNCOUNTED_BY_TORCH = {
    torch.ops.aten._int_mm: _product_flops,
    torch.ops.aten.addmm_: lambda added, a, b, *_, **__: _product_flops(a, b),
    torch.ops.aten._weight_int8pack_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[0],
    torch.ops.aten._grouped_mm: _product_flops,
    grouped.PRODUCT: _product_flops,
    grouped.OUTER_PRODUCT: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[1],
    feature_map.OPERATOR: lambda x, rows, *_, **__: 2 * x[0] * rows[0] * rows[1],
}
"""Operators that torch's FLOP counter does not know, and their FLOPs (its `custom_mapping`)."""


def count_macs(function: Callable[[], Any]) -> int:
    """Multiply-accumulates of the matrix products inside a call without gradients."""
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton, half a second

    # The counter does not know the CPU's fused attention; the plain one is made of products that it counts.
    counting = FlopCounterMode(display=False, custom_mapping=UNCOUNTED_BY_TORCH)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counting as counter:
        function()
    return counter.get_total_flops() // 2


def model_cost(model: nn.Module, batch: Any, call: Callable[[nn.Module, Any], Any]) -> ModelCost:
    """Cost of `call(model, batch)`. Blocks are those replaced by eugen, or else the dense ones."""
    stored = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    layers = _outermost(model) or [site.dense for site in find_ffns(model)]
    return ModelCost(
        params=sum(t.numel() for t in stored),
        macs=count_macs(lambda: call(model, batch)),
        weight_bytes=sum(t.numel() * t.element_size() for t in stored),
        ffn_params=sum(layer.num_parameters() for layer in layers),
        ffn_macs=sum(layer.macs_per_token for layer in layers),
    )


def _outermost(module: nn.Module) -> list[FFNLayer]:
    """Replaced blocks; a layer inside another, such as the one that int8 holds, is part of that."""
    if isinstance(module, FFNLayer):
        return [module]
    return [layer for child in module.children() for layer in _outermost(child)]


def call_cost(function: Callable[[], Any], model: nn.Module) -> CallCost:
    """Products and bytes of a call without gradients, from the operators that it runs.

    Args:
        function: the call, run twice; not compiled, as compiled code shows no operators.
        model: whose parameters and buffers count as weights.
    """
    with torch.no_grad():
        with sdpa_kernel(SDPBackend.MATH), _Operators(model) as counted:  # see count_macs
            function()
        macs = counted.macs
        del counted  # it holds every tensor of the call
        with _Operators(model) as moved:  # as it runs: attention is one operator, and its scores go nowhere
            outputs = function()
    results = {_place(t): _held_bytes(t) for t in _tensors(outputs)}
    return CallCost(
        macs=macs,
        weight_bytes=moved.weight_bytes(),
        io_bytes=sum(results.values()) + sum(moved.inputs.values()),
        activation_bytes=moved.activation_bytes,
    )


_LOOK_UPS = {
    torch.ops.aten.embedding,
    torch.ops.aten.index,
    torch.ops.aten.index_select,
    torch.ops.aten.gather,
}


class _Operators(TorchDispatchMode):
    """Counts operators' products and bytes. Views are free; only what an operator names is read."""

    def __init__(self, model: nn.Module) -> None:
        from torch.utils.flop_counter import flop_registry, shape_wrapper

        super().__init__()
        own = {operator: shape_wrapper(count) for operator, count in UNCOUNTED_BY_TORCH.items()}
        self._flops: dict[Any, Callable] = {**flop_registry, **own}
        storages = (t.untyped_storage() for t in (*model.parameters(), *model.buffers()))
        self._weights = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self._read: dict[int, dict[Any, int]] = {}
        self._made: dict[int, Tensor] = {}
        self.inputs: dict[Any, int] = {}
        self.macs: dict[str, int] = {}
        self.activation_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        result = func(*args, **kwargs)
        packet, made = func._overloadpacket, _tensors(result)
        if packet in self._flops:
            macs = self._flops[packet](*args, **kwargs, out_val=result) // 2
            dtype = str(given[0].dtype).removeprefix("torch.")
            self.macs[dtype] = self.macs.get(dtype, 0) + macs
        known = {_storage(t) for t in given}
        if not func._schema.is_mutable and any(_storage(t) in known for t in made):
            return result  # a view
        for index, tensor in enumerate(given):
            looked_up = packet in _LOOK_UPS and index == 0
            self._count_read(tensor, _held_bytes(made[0] if looked_up else tensor))
        for tensor in made:
            self.activation_bytes += _held_bytes(tensor)
            # Held until the end, so that no later tensor is taken for this one by its address.
            self._made[_storage(tensor)] = tensor
        return result

    def _count_read(self, tensor: Tensor, size: int) -> None:
        storage = _storage(tensor)
        if storage in self._weights:
            self._read.setdefault(storage, {})[_place(tensor)] = size
            return
        self.activation_bytes += size
        if storage not in self._made:
            self.inputs[_place(tensor)] = size

    def weight_bytes(self) -> int:
        """Each weight at most once, whatever parts of it were read."""
        return sum(min(self._weights[place], sum(parts.values())) for place, parts in self._read.items())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Names the memory that a tensor shows: equal for a matrix and its transpose."""
    strides = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    return _storage(tensor), tensor.storage_offset(), tuple(strides)


def _held_bytes(tensor: Tensor) -> int:
    """Bytes of its distinct elements: those of an expanded tensor are repeated, not stored."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or n == 0)
    return math.prod(sizes) * tensor.element_size()

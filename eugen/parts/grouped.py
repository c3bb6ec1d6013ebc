"""Products of every row with the weights of its own expert.

Rows are sorted by expert and multiplied group by group. Inference on the CPU reads the groups' sizes and
calls a product for each, straight into one result; everything else makes one call,
`torch.nn.functional.grouped_mm`. That has no float64 and wants row strides of whole 16 bytes; where neither
can be used, each row's weights are copied out for a batched product.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from eugen.ffn import autocasts, runs_inference
from eugen.shapes import Float

ALIGNMENT_BYTES = 16
"""Row strides of a grouped product are multiples of this."""
LOOPED_GROUPS = 16
"""So many groups at most are multiplied one by one: more would be many small products."""


@torch.library.custom_op("eugen::grouped_mm", mutates_args=())
def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    # An operator of our own, because torch's shape function refuses float32, which its kernel takes.
    return F.grouped_mm(x.contiguous(), weight, offs=offsets).contiguous()


@_grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[-1])


@torch.library.custom_op("eugen::grouped_outer", mutates_args=())
def _grouped_outer(x: torch.Tensor, y: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return F.grouped_mm(x.contiguous().T, y.contiguous(), offs=offsets).contiguous()


@_grouped_outer.register_fake
def _(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(len(offsets), x.shape[1], y.shape[1])


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, offsets = cast("tuple[Tensor, ...]", getattr(ctx, "saved_tensors"))  # noqa: B009
    (gradient,) = gradients
    back = PRODUCT(gradient, weight.transpose(1, 2), offsets)
    return back, OUTER_PRODUCT(x, gradient, offsets), None


_grouped_mm.register_autograd(_backward, setup_context=_save)


PRODUCT, OUTER_PRODUCT = torch.ops.eugen.grouped_mm, torch.ops.eugen.grouped_outer


def takes_groups(x: Float[Tensor, "t k"], weight: Float[Tensor, "e n k"]) -> bool:
    """Whether a grouped product exists for these dtypes, sizes and device."""
    aligned = all(size * x.element_size() % ALIGNMENT_BYTES == 0 for size in weight.shape[1:])
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return aligned and known and x.shape[0] > 0 and not x.is_meta and not torch.compiler.is_exporting()


def takes_loop(x: Float[Tensor, "t k"], weight: Float[Tensor, "e n k"]) -> bool:
    """Whether groups are multiplied one by one: few, of known sizes, and nothing is derived or cast."""
    few = weight.shape[0] <= LOOPED_GROUPS and x.dtype == weight.dtype
    return few and runs_inference() and reads_are_free(x) and not autocasts(x.device)


def reads_are_free(x: Tensor) -> bool:
    """Whether a number may be read off a tensor: on the CPU nothing waits, a graph would break."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class Groups:
    """Rows sorted by expert.

    Attributes:
        order: which row stands at each place.
        expert: its expert, ascending.
        ends: where each expert's group ends, int32 `[E]`.
        sizes: rows of each expert, where they were read.
    """

    order: Tensor
    expert: Tensor
    ends: Tensor
    sizes: list[int] | None = None


def group(expert: Tensor, experts: int, *, read: bool = False) -> Groups:
    """Sort rows by their expert `[rows]`, an index below `experts`; `read` the sizes where `takes_loop`."""
    ordered, order = expert.sort()
    ids = torch.arange(experts, device=expert.device)
    ends = torch.searchsorted(ordered, ids, right=True, out_int32=True)
    sizes = [end - start for start, end in pairwise([0, *ends.tolist()])] if read else None
    return Groups(order, ordered, ends, sizes)


def grouped_product(
    x: Float[Tensor, "t k"],
    weight: Float[Tensor, "e n k"],
    groups: Groups,
    bias: Float[Tensor, "e n"] | None = None,
) -> Float[Tensor, "t n"]:
    """`weight[expert] x + bias[expert]` of sorted rows; needs `takes_groups`, or sizes that were read.

    In the one call a view of weights whose rows do not start at whole 16 bytes is copied.
    """
    if groups.sizes is not None:
        return _looped_product(x, weight, groups.sizes, bias)
    if any(stride * weight.element_size() % ALIGNMENT_BYTES for stride in weight.stride() if stride != 1):
        weight = weight.contiguous()
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if gradients or torch.compiler.is_compiling():
        # torch's own backward refuses gradients that were expanded, such as those of `sum`.
        y = torch.ops.eugen.grouped_mm(x, weight.transpose(1, 2), groups.ends)
    else:
        y = F.grouped_mm(x, weight.transpose(1, 2), offs=groups.ends)
    return y if bias is None else y + bias[groups.expert]


def _looped_product(
    x: Float[Tensor, "t k"], weight: Float[Tensor, "e n k"], sizes: list[int], bias: Tensor | None
) -> Float[Tensor, "t n"]:
    """Of any dtype and strides, without a copy. A bias costs no pass of its own."""
    y = x.new_empty(x.shape[0], weight.shape[1])
    weights = weight.transpose(1, 2).unbind()
    biases = [None] * len(sizes) if bias is None else bias.unbind()
    for rows, own, added, result in zip(x.split(sizes), weights, biases, y.split(sizes), strict=True):
        if rows.shape[0] == 0:
            continue
        if added is None:
            torch.mm(rows, own, out=result)
        else:
            torch.addmm(added, rows, own, out=result)
    return y


def gathered_product(
    x: Float[Tensor, "t k"], weight: Float[Tensor, "e n k"], expert: Tensor
) -> Float[Tensor, "t n"]:
    """`weight[expert] x` with a copy of the weights for every row: any dtype and size, few rows."""
    return torch.bmm(weight[expert], x.unsqueeze(-1)).squeeze(-1)

"""Products of every row with the weights of its own expert, without a loop over the experts.

Rows are sorted by expert and multiplied group by group in one call, `torch.nn.functional.grouped_mm`.
It has no float64 and wants row strides of whole 16 bytes; where it cannot be used, each row's weights
are copied out for a batched product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from eugen.shapes import Float

ALIGNMENT_BYTES = 16
"""Row strides of a grouped product are multiples of this."""


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
    """

    order: Tensor
    expert: Tensor
    ends: Tensor


def group(expert: Tensor, experts: int) -> Groups:
    """Sort rows by their expert `[rows]`, an index below `experts`."""
    ordered, order = expert.sort()
    ids = torch.arange(experts, device=expert.device)
    return Groups(order, ordered, torch.searchsorted(ordered, ids, right=True, out_int32=True))


def grouped_product(
    x: Float[Tensor, "t k"], weight: Float[Tensor, "e n k"], groups: Groups
) -> Float[Tensor, "t n"]:
    """`weight[expert] x` of sorted rows; needs `takes_groups`.

    A view of weights whose rows do not start at whole 16 bytes is copied.
    """
    if any(stride * weight.element_size() % ALIGNMENT_BYTES for stride in weight.stride() if stride != 1):
        weight = weight.contiguous()
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if gradients or torch.compiler.is_compiling():
        # torch's own backward refuses gradients that were expanded, such as those of `sum`.
        return torch.ops.eugen.grouped_mm(x, weight.transpose(1, 2), groups.ends)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=groups.ends)


def gathered_product(
    x: Float[Tensor, "t k"], weight: Float[Tensor, "e n k"], expert: Tensor
) -> Float[Tensor, "t n"]:
    """`weight[expert] x` with a copy of the weights for every row: any dtype and size, few rows."""
    return torch.bmm(weight[expert], x.unsqueeze(-1)).squeeze(-1)

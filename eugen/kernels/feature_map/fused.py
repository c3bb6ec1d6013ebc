"""The feature map as one Triton kernel: z, norm, products and Φ of a tile never leave the chip.

Why the readout is a product of its own and not the end of this kernel. Per token, with F features in all,
p rows of G, `out` outputs and s bytes a number:

- on chip to the end: 64 tokens need 64·out float32 of accumulator, at out = 768 192 KiB of the 256 KiB of
  registers that a multiprocessor has, which leaves no room for z. So the outputs are cut into tiles, 256
  wide at most, and each computes the features anew: ⌈out/256⌉·p·d + F·out MACs.
- features written once: p·d + F·out MACs, and 2·F·s bytes to write and read.

d = out = 768, order 2 with independent rows at 30 % of a dense block of 3072 neurons: m = 368, F = 736
and p = 1104. By an H200's data sheet (495 TMAC/s in bf16, 4.8 TB/s), in ns a token: recomputing 3·1.71 +
1.14 = 6.3; writing 1.71 + 1.14 = 2.9, and each of the two products moves 3 KB, 0.6 ns, beside its
arithmetic. d = 1024 with 4096 neurons, m = 488: recomputing 4·3.03 + 2.02 = 14.1, writing 5.0. Both
products are bound by arithmetic, so that the features' way to memory and back is hidden, and the second
one can be the vendor's own. What the composed form pays on top are its passes over x and z (norm,
addition, product: 9 KB, 1.8 ns at d = 768; Φ 3 KB more) and their launches. At 4096 tokens z fits the
second-level cache: the passes are cheaper, the launches weigh more.
"""

# Triton's language is Python to read, but not to type.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eugen.shapes import Float


@triton.jit
def _activated(p, ACTIVATION: tl.constexpr):
    # Written so that NaN stays NaN and nothing else becomes NaN.
    if ACTIVATION == "relu":
        p = tl.where(p <= 0, 0.0, p)
    elif ACTIVATION == "gelu":
        p = 0.5 * p * (1 + tl.erf(p * 0.7071067811865476))
    elif ACTIVATION == "silu":
        p = p / (1 + tl.exp(-p))
    elif ACTIVATION == "softplus":
        p = tl.where(p <= 0, 0.0, p) + tl.log(1 + tl.exp(-tl.abs(p)))
    elif ACTIVATION == "tanh":
        e = tl.exp(-2 * tl.abs(p))
        p = tl.where(p < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    elif ACTIVATION == "exp":
        p = tl.exp(p)
    return p


@triton.jit
def _projections(
    x_tile, weight_tile, group_stride, d,
    GROUPS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr, WHOLE_STEPS: tl.constexpr,
    WIDEN: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """x Gᵀ of a tile, one accumulator a group, and ‖x‖² of its tokens from the same loads."""
    z = ()
    for _ in tl.static_range(GROUPS):
        z = z + (tl.zeros((TOKENS, FEATURES), dtype=tl.float32),)
    square = tl.zeros((TOKENS,), dtype=tl.float32)
    for start in range(0, d, STEP):
        inside = (start + tl.arange(0, STEP))[None, :] < d
        a = tl.load(x_tile + start) if WHOLE_STEPS else tl.load(x_tile + start, mask=inside, other=0.0)
        a = a.to(tl.float32) if WIDEN else a
        if NORM:
            wide = a.to(tl.float32)
            square += tl.sum(wide * wide, axis=1)
        following = ()
        for group in tl.static_range(GROUPS):
            pointers = weight_tile + group * group_stride + start
            b = tl.load(pointers) if WHOLE_STEPS else tl.load(pointers, mask=inside, other=0.0)
            b = b.to(tl.float32) if WIDEN else b
            following = following + (tl.dot(a, b.T, z[group], input_precision=PRECISION),)
        z = following
    return z, square


@triton.jit(do_not_specialize=["tokens", "token_class"])
def feature_map_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, out_ptr, tokens, token_class, d, m, x_stride, weight_stride,
    ORDER: tl.constexpr, LOWEST: tl.constexpr, GROUPS: tl.constexpr, OWN: tl.constexpr, NEXT: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE_STEPS: tl.constexpr, WIDEN: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile of tokens and, of every order, the same tile of its m features.

    Args:
        token_class: all that autotuning knows of `tokens`.
        OWN: 1 where each order has groups of its own, 0 where its first factor is the first group.
        NEXT: 1 where each factor is another group, 0 where all are the same one.
        WHOLE_STEPS: d is a multiple of STEP.
        WIDEN: multiply in float32; Triton's interpreter would take bfloat16 for whole numbers.
    """
    # Neighbours share their tokens: that tile of x comes from memory once; G stays in the cache.
    feature_tiles = tl.cdiv(m, FEATURES)
    rows = (tl.program_id(0) // feature_tiles) * TOKENS + tl.arange(0, TOKENS)
    columns = (tl.program_id(0) % feature_tiles) * FEATURES + tl.arange(0, FEATURES)
    # Beyond the edge the beginning is read again: only the store needs a mask.
    read, inner = columns % m, tl.arange(0, STEP)[None, :]
    x_tile = x_ptr + (rows % tokens).to(tl.int64)[:, None] * x_stride + inner
    weight_tile = weight_ptr + read[:, None] * weight_stride + inner
    sums, square = _projections(
        x_tile, weight_tile, m * weight_stride, d,
        GROUPS, NORM, PRECISION, WHOLE_STEPS, WIDEN, TOKENS, FEATURES, STEP,
    )  # fmt: skip
    z = ()
    for group in tl.static_range(GROUPS):
        part = sums[group]
        if BIAS:
            part += tl.load(bias_ptr + group * m + read).to(tl.float32)[None, :]
        if NORM:
            slot = tl.load(norm_ptr + group * m + read).to(tl.float32)
            part += tl.sqrt(square)[:, None] * slot[None, :]
        z = z + (part,)
    out_tile = out_ptr + rows.to(tl.int64)[:, None] * ((ORDER - LOWEST + 1) * m) + columns[None, :]
    inside = (rows[:, None] < tokens) & (columns[None, :] < m)
    for order in tl.static_range(LOWEST, ORDER + 1):
        product = z[OWN * ((order - LOWEST) * (order + LOWEST - 1) // 2)]
        for factor in tl.static_range(1, order):
            product = product * z[OWN * ((order - LOWEST) * (order + LOWEST - 1) // 2) + NEXT * factor]
        features = _activated(product, ACTIVATION).to(out_ptr.dtype.element_ty)
        tl.store(out_tile + (order - LOWEST) * m, features, mask=inside)


_ACCUMULATED = 128 * 256
"""Numbers in all accumulators of one program: half of a multiprocessor's registers."""


def tiles(groups: int, size: int, m: int, staged_bytes: int) -> list[triton.Config]:
    """What autotuning chooses from: tiles that fill the registers by a quarter or more and fit the memory.

    Args:
        size: bytes of a number.
        staged_bytes: shared memory that a program may have, for the tiles in flight.
    """
    step, configs = 128 // size, []
    for tokens, features in itertools.product((64, 128, 256), (32, 64, 128, 256)):
        accumulated = groups * tokens * features
        stages = min(4, staged_bytes // (step * size * (tokens + groups * features)))
        if features >= 2 * m or stages < 2 or not _ACCUMULATED / 4 <= accumulated <= _ACCUMULATED:
            continue
        tile = {"TOKENS": tokens, "FEATURES": features, "STEP": step}
        warps = 8 if 2 * accumulated > _ACCUMULATED or tokens == 256 else 4  # fewer would spill registers
        configs.append(triton.Config(tile, num_warps=warps, num_stages=stages))
    return configs or [triton.Config({"TOKENS": 64, "FEATURES": 32, "STEP": 32}, num_warps=4, num_stages=2)]


@functools.cache
def _tuned(groups: int, size: int, m: int, device: torch.device) -> Any:
    """The kernel with its choice of tiles; Triton's cache folder keeps what it chose, by device and sizes."""
    if triton.knobs.runtime.interpret:  # nothing to measure: one small tile
        configs = [triton.Config({"TOKENS": 32, "FEATURES": 32, "STEP": 32})]
    else:
        properties = torch.cuda.get_device_properties(device)
        configs = tiles(groups, size, m, properties.shared_memory_per_block_optin)
    key = ["token_class", "d", "m", "ORDER", "LOWEST", "BIAS", "NORM", "ACTIVATION", "PRECISION"]
    return triton.autotune(configs=configs, key=key, cache_results=True)(feature_map_kernel)


def feature_map(
    x: Float[Tensor, "t d_in"],
    weight: Float[Tensor, "p d_in"],
    bias: Float[Tensor, " p"] | None,
    norm: Float[Tensor, " p"] | None,
    order: int,
    lowest: int,
    sharing: str,
    activation: str,
) -> Float[Tensor, "t f"]:
    """`naive.feature_map` in one launch: sums in float32, products of float32 as torch is set for `matmul`.

    The first call of a size measures tiles, which a CUDA graph's capture cannot: run it once before.
    """
    groups = {"powers": 1, "shared": order, "independent": sum(range(lowest, order + 1))}[sharing]
    m, d = len(weight) // groups, x.shape[1]
    out = x.new_empty(len(x), (order - lowest + 1) * m)
    if out.numel() == 0:
        return out
    x, weight = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (x, weight))
    bias, norm = (None if slot is None else slot.contiguous() for slot in (bias, norm))
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"

    def programs(tile: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(len(x), tile["TOKENS"]) * triton.cdiv(m, tile["FEATURES"]),)

    kernel = _tuned(groups, x.element_size(), m, x.device)
    with torch.cuda.device_of(x):
        kernel[programs](
            x, weight, x if bias is None else bias, x if norm is None else norm, out,
            len(x), _token_class(len(x)), d, m, x.stride(0), weight.stride(0),
            ORDER=order, LOWEST=lowest, GROUPS=groups,
            OWN=int(sharing == "independent"), NEXT=int(sharing != "powers"),
            BIAS=bias is not None, NORM=norm is not None, ACTIVATION=activation,
            PRECISION="tf32" if tf32 else "ieee", WHOLE_STEPS=d % 64 == 0,
            WIDEN=triton.knobs.runtime.interpret,
        )  # fmt: skip
    return out


def _token_class(tokens: int) -> int:
    """Numbers of tokens that share a choice of tile: powers of two from 256 to 65536."""
    return min(max(math.ceil(math.log2(tokens)), 8), 16)

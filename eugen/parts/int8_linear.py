"""Linear maps in 8-bit integers: symmetric, weights per output row.

Weight-only, y_o = Σ_i (s_o q_oi) x_i + b_o,      q_oi = round(W_oi / s_o),  s_o = max_i |W_oi| / 127
With inputs, y_o = s_o t Σ_i q_oi r_i + b_o,      r_i = round(x_i / t),      t = max_i |x_i| / 127

Inputs are quantised per token as they come. Their sum is one of integers and hence exact; what is lost are
the two roundings (LLM.int8's vector-wise scheme, arXiv 2208.07339, section 2.1, without outliers).
Weight-only loses the first alone, and gains where reading the weights is what takes the time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from eugen.shapes import Float

LARGEST = 127
"""−128 is left out, so that a row and its negative are quantised alike."""

# oneDNN's products of bytes need VNNI; without, torch computes them one by one, slower than in floats.
_CPU_MULTIPLIES_BYTES = torch.cpu._is_vnni_supported()
_LEAST_CUDA_TOKENS, _CUDA_MULTIPLE = 17, 8

# torch's own product of bfloat16 with bytes. Its vector code is for these processors and this dtype; else,
# on CUDA too, it is a plain loop, slower than the product of dequantised weights, as it is for more tokens.
_CPU_READS_BYTES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
_MOST_PACKED_TOKENS = 8
_PACKED_MULTIPLE, _PACKED_ALIGNMENT = 16, 32
"""It loads 16 numbers at a time from addresses that it takes for aligned, and looks at neither."""


class WeightOnlyInt8Linear(nn.Module):
    """The map with weights as bytes and all else as it was: products and sums are those of the inputs' dtype.

    Weights are a buffer of bytes; scales and bias are parameters and can be trained.

    Args:
        linear: the map to quantise; it is left as it was.
    """

    quantised: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = _step(weight)[:, 0].to(weight.dtype)
        scale = torch.where(scale > 0, scale, 1)  # in float16 the step of a tiny row is 0
        wide = torch.promote_types(weight.dtype, torch.float32)
        # A scale in half precision may be rounded down, and the largest weight then be 128 of its steps.
        whole = (weight.to(wide) / scale.to(wide)[:, None]).round().clamp(-LARGEST, LARGEST)
        self.register_buffer("quantised", whole.to(torch.int8))
        self.scale = nn.Parameter(scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The weights that the bytes stand for."""
        return self.quantised * self.scale[:, None]

    def reference(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The definition."""
        return functional.linear(x, self.weight, self.bias)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if torch.is_grad_enabled() or torch.compiler.is_exporting() or not self._scales_outputs(x):
            return self.reference(x)
        flat = x.reshape(-1, self.in_features)
        if self._is_packed(flat):
            y = torch._weight_int8pack_mm(flat, self.quantised, self.scale)
            y = y if self.bias is None else y.add_(self.bias)
        else:
            y = functional.linear(flat, self.quantised.to(x.dtype))
            y = self._scaled(y)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _scaled(self, y: Float[Tensor, "t d_out"]) -> Float[Tensor, "t d_out"]:
        y = y.mul_(self.scale)  # in place: fresh memory takes longer than a pass over it
        return y if self.bias is None else y.add_(self.bias)

    def _scales_outputs(self, x: Float[Tensor, "*batch d_in"]) -> bool:
        """Whether the outputs may be scaled in place of the weights: one pass less over these.

        On other devices that pass is one kernel either way; in float16 the sums of whole numbers overflow.
        """
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        return x.dtype == self.scale.dtype != torch.float16

    def _is_packed(self, x: Float[Tensor, "t d_in"]) -> bool:
        """Whether torch's product of floats with bytes takes these inputs, and is the faster one."""
        if torch.compiler.is_compiling() or type(x) is not Tensor:  # there are no addresses to look at
            return False
        if not (_CPU_READS_BYTES and x.dtype == torch.bfloat16 and len(x) <= _MOST_PACKED_TOKENS):
            return False
        if self.in_features % _PACKED_MULTIPLE or not (x.is_contiguous() and self.quantised.is_contiguous()):
            return False
        return (x.data_ptr() | self.quantised.data_ptr()) % _PACKED_ALIGNMENT == 0


class Int8Linear(WeightOnlyInt8Linear):
    """The map that quantises its inputs too.

    Without gradients the products are those of bytes where the device has them; with gradients, on other
    devices and in an exported program they are the definition's, of whole numbers held in floats.
    """

    def reference(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The definition. Its gradient passes the rounding as if that were not there (straight through)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        step = _step(x.detach())
        scaled = x.to(wide) / step
        whole = scaled.detach().round() + (scaled - scaled.detach())
        y = functional.linear(whole, self.quantised.to(wide)) * (step * self.scale)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if torch.is_grad_enabled() or torch.compiler.is_exporting():
            return self.reference(x)
        flat = x.reshape(-1, self.in_features)
        if not self._multiplies_bytes(flat):
            return self.reference(x)
        step = _step(flat)
        whole = (flat.to(step.dtype) / step).round_().to(torch.int8)
        y = self._scaled(torch._int_mm(whole, self.quantised.t()) * step)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _multiplies_bytes(self, x: Float[Tensor, "t d_in"]) -> bool:
        if x.device.type == "cpu":  # of one column torch 2.14 returns unwritten memory
            return _CPU_MULTIPLIES_BYTES and self.in_features > 1
        whole_tiles = self.in_features % _CUDA_MULTIPLE == 0 and self.out_features % _CUDA_MULTIPLE == 0
        return x.device.type == "cuda" and whole_tiles and len(x) >= _LEAST_CUDA_TOKENS


def _step(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch 1"]:
    """The size of one of 127 steps to each row's largest entry, in float32 or wider; never 0."""
    largest = x.abs().amax(-1, keepdim=True).to(torch.promote_types(x.dtype, torch.float32))
    return largest.div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)


def quantise(module: nn.Module, kind: type[WeightOnlyInt8Linear] = Int8Linear) -> int:
    """Put a map of this kind in the place of every `nn.Linear` inside; returns their MACs per token."""
    macs = 0
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, kind(child))
            macs += child.in_features * child.out_features
        else:
            macs += quantise(child, kind)
    return macs

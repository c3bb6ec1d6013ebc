"""What an adapter says about a block, and what adapters make blocks of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from eugen.ffn import DenseFFN
from eugen.shapes import Float


@dataclass(frozen=True)
class FFNParts:
    """What an adapter found in one module; paths are relative to it, "" is the module itself.

    Attributes:
        dense: the block, made of the model's own modules. Where it cannot be, of maps that say the same:
            views of a packed gate's weights, copies for `Conv1D` and for a layer scale folded in.
        slot: the module that the new layer takes the place of; its input is the block's input.
        bypass: modules (or functions) that become the identity, because the new layer does their work.
        output: the module whose output is the block's output (before surgery).
        stream: the module whose input is the residual stream that the block's output is added to;
            None where the block has no residual connection or it is unknown.
        norm: the LayerNorm that follows at once, on the residual sum (post-norm) or, without stream, on the
            block's output; None if there is none.
        settings: attributes that surgery sets, path and value, such as a fused path switched off.
    """

    dense: DenseFFN
    slot: str
    output: str
    bypass: tuple[str, ...] = ()
    stream: str | None = None
    norm: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    def within(self, path: str) -> FFNParts:
        """The same, seen from a module that has this one at `path`."""
        return replace(
            self,
            slot=join(path, self.slot),
            output=join(path, self.output),
            bypass=tuple(join(path, p) for p in self.bypass),
            stream=None if self.stream is None else join(path, self.stream),
            norm=None if self.norm is None else join(path, self.norm),
            settings=tuple((join(path, p), value) for p, value in self.settings),
        )


Adapter = Callable[[nn.Module], "FFNParts | list[FFNParts] | None"]


def join(path: str, relative: str) -> str:
    """Paths of modules, one inside the other; "" is the module itself."""
    return ".".join(p for p in (path, relative) if p)


def qualified_name(module_type: type) -> str:
    """The name that adapters are kept under."""
    return f"{module_type.__module__}.{module_type.__qualname__}"


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def as_module(act: object) -> nn.Module | None:
    """An activation given as a module or as a function; None for anything else."""
    if isinstance(act, nn.Module):
        return act
    return Function(act) if callable(act) else None


def linear_of(weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None) -> nn.Linear:
    """A linear map of these weights, which are copied only where they do not lie row by row."""
    d_out, d_in = weight.shape
    linear = nn.Linear(d_in, d_out, bias=bias is not None, device="meta")
    # Quantised weights cannot take a gradient; `replace` refuses them in words of its own.
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=weight.is_floating_point())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear


def halves(packed: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
    """The two maps that one packed matrix holds, the first half of its outputs and the second, as views."""
    width, bias = packed.out_features // 2, packed.bias
    found = (
        linear_of(packed.weight[:width], None if bias is None else bias[:width]),
        linear_of(packed.weight[width:], None if bias is None else bias[width:]),
    )
    for half in found:  # packed integers have a shape of their own
        half.in_features, half.out_features = packed.in_features, width
    return found


def scaled(dense: DenseFFN, scale: Float[Tensor, " d_out"]) -> DenseFFN:
    """The block with a factor for each output folded into its output matrix."""
    assert dense.down is not None
    if not dense.down.weight.is_floating_point():
        return dense  # quantised: `replace` refuses it
    bias = dense.down.bias
    down = linear_of(dense.down.weight * scale[:, None], None if bias is None else bias * scale)
    return DenseFFN(dense.up, dense.act, down, dense.gate)


@torch.no_grad()
def says_the_same(module: nn.Module, dense: DenseFFN) -> bool:
    """Whether the block computes what the module does, on two random tokens and in evaluation mode.

    True where it cannot be known: without weights (meta device), with quantised ones or several dtypes (which
    `replace` refuses in words of its own), or where the results are not finite.
    """
    weight = dense.up.weight
    if any(w.is_meta or w.dtype != weight.dtype or not w.is_floating_point() for w in dense.parameters()):
        return True
    x = torch.randn(1, 2, dense.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
    # Autocast would round the two by different roads.
    with evaluating(module, dense), torch.autocast(weight.device.type, enabled=False):
        try:
            wanted = module(x.clone())
        except Exception:  # somebody's code was given tokens: whatever it says, it is no block of tokens
            return False
        given = dense(x)
    if not isinstance(wanted, Tensor) or wanted.shape != given.shape:
        return False
    wanted, given = wanted.double(), given.double()
    allowed = torch.finfo(weight.dtype).eps ** 0.5 * torch.linalg.vector_norm(wanted)
    return bool(torch.linalg.vector_norm(given - wanted) <= allowed) or not bool(wanted.isfinite().all())


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode; every part gets its own mode back."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training

"""What is profiled: a model, its inputs, and which part of it runs in which call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import eugen
from eugen.ffn import FFNLayer
from eugen.timing import networks
from eugen.timing.spec import parse

CALLS, SCOPES = ("forward", "prefill", "decode"), ("model", "ffn", "layer")
BUILT_IN = {
    "mlp": (networks.mlp, lambda model: (model[0].in_features,)),
    "transformer": (networks.transformer, lambda model: (128, model[0].norm1.normalized_shape[0])),
}
"""Factories by their short name, and the shape of one example (a transformer's has 128 tokens)."""


@dataclass(frozen=True)
class Subject:
    """A model and inputs of any batch size.

    Attributes:
        name: as in the record.
        model: in evaluation mode it takes `example(batch)` as its one argument.
        example: batch size to inputs.
    """

    name: str
    model: nn.Module
    example: Callable[[int], Any]

    def inputs(self, call: str, batch: int) -> Any:
        """Inputs of a call: `forward` and `prefill` take them whole, `decode` one token of each sequence.

        Raises:
            ValueError: prefill or decode of inputs that are no token ids.
        """
        found = self.example(batch)
        if call == "forward":
            return found
        if not isinstance(found, Tensor) or found.is_floating_point() or found.ndim != 2:
            raise ValueError(f"call {call!r} is for ids [batch, tokens]: give --input ids:TOKENS:VOCABULARY")
        return found[:, -1:].contiguous() if call == "decode" else found


def moved(example: Any, device: str | None, dtype: torch.dtype) -> Any:
    """Every tensor of the inputs on a device (None: where it is); those of floating point in this dtype."""

    def move(t: Tensor) -> Tensor:
        return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

    return tree_map_only(Tensor, move, example)


def load(spec: str, given: str | None = None) -> Subject:
    """A model from its name on the command line, with random weights.

    Args:
        spec: `mlp`, `transformer`, `timm:NAME`, or `package.module:factory`, each with options in brackets.
            A factory returns a model, or a model and a function from a batch size to inputs.
        given: shape of one example, `3x224x224`, or `ids:TOKENS:VOCABULARY`.

    Raises:
        ValueError: a name that leads nowhere, or inputs that nobody tells.
    """
    place, options = parse(spec)
    with torch.random.fork_rng(devices=[]):  # factories draw from the global generator, which stays as it was
        torch.manual_seed(0)
        made, shape = _make(place, options)
    model, example = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {spec!r} made {type(model).__name__}, no torch.nn.Module")
    if given is not None:
        example = example_of(given)
    elif example is None and shape is not None:
        example = example_of("x".join(map(str, shape)))
    if example is None:
        raise ValueError(f"--model {spec!r} tells no inputs: give --input, as 3x224x224 or ids:1024:50257")
    return Subject(spec, model.eval().requires_grad_(False), example)


def _make(place: str, options: dict[str, Any]) -> tuple[Any, tuple[int, ...] | None]:
    package, colon, name = place.partition(":")
    if place in BUILT_IN:
        factory, shape = BUILT_IN[place]
        model = factory(**options)
        return model, shape(model)
    if not colon:
        known = ", ".join(BUILT_IN)
        raise ValueError(f"--model {place!r} must be {known}, timm:NAME or package.module:factory")
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"--model {place!r}: {error}; install it, or check the spelling") from error
    if package == "timm":
        model = module.create_model(name, pretrained=False, **options)
        return model, tuple(model.default_cfg["input_size"])
    if not hasattr(module, name):
        raise ValueError(f"--model {place!r}: module {package!r} has no {name!r}")
    return getattr(module, name)(**options), None


def example_of(text: str, *, option: str = "--input") -> Callable[[int], Tensor]:
    """A function from a batch size to inputs of a shape.

    Args:
        text: `3x224x224`, or `ids:TOKENS:VOCABULARY`.
        option: that it was given by, for the message.

    Raises:
        ValueError: it is neither.
    """
    kind, *sizes = text.split(":") if text.startswith("ids:") else ("", *text.split("x"))
    try:
        numbers = [int(size) for size in sizes]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or (kind == "ids" and len(numbers) != 2):
        raise ValueError(f"{option} {text!r} must be a shape as 3x224x224, or ids:TOKENS:VOCABULARY")

    def example(batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        if kind == "ids":
            return torch.randint(numbers[1], (batch, numbers[0]), generator=generator)
        return torch.randn(batch, *numbers, generator=generator)

    return example


@dataclass(frozen=True)
class Part:
    """What runs of a model: all of it, or feed-forward blocks on inputs of their own.

    Attributes:
        name: `model`, `ffn`, or the one block's name.
        sites: names of the blocks; None for the whole model.
        example: inputs of `of(model)`.
    """

    name: str
    sites: tuple[str, ...] | None
    example: Any

    def of(self, model: nn.Module) -> nn.Module:
        """This part of the dense model, of its copy, or of one whose blocks are replaced."""
        if self.sites is None:
            return model
        dense = {site.name: site.dense for site in eugen.find_ffns(model)}
        return Blocks([dense[n] if n in dense else _replaced(model, n) for n in self.sites])


class Blocks(nn.ModuleList):
    """Blocks that run one after the other, each on its own inputs."""

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [block(x) for block, x in zip(self, inputs, strict=True)]


def parts(model: nn.Module, example: Any, scope: str) -> list[Part]:
    """The parts of a scope: one, or each block for `layer`. Blocks' inputs are those of a real forward."""
    if scope == "model":
        return [Part("model", None, example)]
    inputs = block_inputs(model, example)
    if scope == "ffn":
        return [Part("ffn", tuple(inputs), list(inputs.values()))]
    return [Part(name, (name,), [x]) for name, x in inputs.items()]


@torch.no_grad()
def block_inputs(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """What each feed-forward block gets in one forward pass; of one that runs several times, the first.

    Raises:
        ValueError: the model has no block that eugen knows.
    """
    sites, seen = eugen.find_ffns(model), {}
    if not sites:
        raise ValueError(
            f"no feed-forward block found in {type(model).__name__}: eugen.register_site teaches it"
        )

    def keep(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, args: Any) -> None:
            if name not in seen:
                seen[name] = args[0].detach().clone()

        return hook

    hooks = [model.get_submodule(s.name).register_forward_pre_hook(keep(s.name)) for s in sites]
    try:
        model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return {site.name: seen[site.name] for site in sites if site.name in seen}


def _replaced(model: nn.Module, name: str) -> FFNLayer:
    layer = model.get_submodule(name)
    assert isinstance(layer, FFNLayer)
    return layer

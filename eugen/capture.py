"""The activations of blocks during a forward pass of their model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eugen.sites import FFNSite
from eugen.sites.faults import SiteFault, batch_failed, called_by_keyword, shared_block
from eugen.sites.parts import evaluating

__all__ = ["capturing", "evaluating", "explaining", "listening"]


class _Enough(Exception):
    """Ends a forward pass once everything wanted was captured."""


@contextmanager
def listening(
    model: nn.Module,
    sites: Sequence[FFNSite],
    keep: Callable[[FFNSite, str, Tensor], None],
    *,
    stop: bool = False,
) -> Iterator[None]:
    """Hand over `[T, d]` activations of sites as soon as they are there, in one forward pass inside `with`.

    Args:
        keep: takes the site, what it is, and a copy of the values: "input", "output" (not with `stop`) and,
            where there is a residual stream, "stream".
        stop: end the pass, and with it the `with` block, at the first of the sites' inputs.

    Raises:
        SiteFault: a block runs several times in one pass, or is called with keywords only.
    """
    seen: set[tuple[str, str]] = set()
    handles = []

    def take(site: FFNSite, what: str, value: Tensor | None = None, *_: Any) -> None:
        if value is None:
            raise SiteFault(called_by_keyword(site))
        if (site.name, what) in seen:
            raise SiteFault(shared_block(model, site))
        seen.add((site.name, what))
        # A copy: what follows may write into the tensor in place, as nn.ReLU(inplace=True) does.
        keep(site, what, value.detach().reshape(-1, value.shape[-1]).clone())
        if stop and what == "input":
            raise _Enough

    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        # torch's fused encoder runs past the modules, and packs padded batches.
        torch.backends.mha.set_fastpath_enabled(False)
        for site in sites:
            handles += _hooks(model, site, take, output=not stop)
        yield
    except _Enough:
        pass
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()


def _hooks(
    model: nn.Module, site: FFNSite, take: Callable[..., None], *, output: bool
) -> Iterator[RemovableHandle]:
    def before(what: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: take(site, what, *args)

    def after(_module: nn.Module, _args: tuple[Any, ...], value: Tensor) -> None:
        take(site, "output", value)

    if site.stream is not None:  # before the input's hook: both may sit on one module
        yield model.get_submodule(site.stream).register_forward_pre_hook(before("stream"))
    yield model.get_submodule(site.name).register_forward_pre_hook(before("input"))
    if output:
        yield model.get_submodule(site.output).register_forward_hook(after)


@contextmanager
def capturing(
    model: nn.Module, sites: Sequence[FFNSite], *, stop: bool = False
) -> Iterator[dict[tuple[str, str], Tensor]]:
    """`listening` into a dictionary whose keys are a site's name and what it is."""
    seen: dict[tuple[str, str], Tensor] = {}

    def keep(site: FFNSite, what: str, value: Tensor) -> None:
        seen[site.name, what] = value

    with listening(model, sites, keep, stop=stop):
        yield seen


@contextmanager
def explaining(
    model: str, number: int, batch: Any, sites: Sequence[FFNSite], reached: Collection[str]
) -> Iterator[None]:
    """Say of a failed forward pass which batch it was and how far it came.

    Args:
        model: which one, in words.
        number: of the batch, from 1.
        reached: names of the blocks whose input was seen so far.

    Raises:
        ValueError: in the place of what the model or the call raised, which is its cause.
    """
    try:
        yield
    except (SiteFault, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        said = batch_failed(
            error, model=model, number=number, batch=batch, sites=list(sites), reached=set(reached)
        )
        raise ValueError(said) from error

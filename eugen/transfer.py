"""Transfer of a trained network's knowledge, block by block, in closed form.

Each block is fitted on the activations of the already replaced network, against a target that
also makes up for what the residual stream lost: `teacher(stream + y) − stream of the student`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from eugen.config import LayerConfig
from eugen.ffn import FFNLayer
from eugen.least_squares import HELD_OUT, fit_quality
from eugen.sites import FFNSite
from eugen.sites.faults import shared_block

Chunk = tuple[Tensor, Tensor, "Tensor | None"]


def default_call(model: nn.Module, batch: Any) -> Any:
    """`model(batch)`."""
    return model(batch)


class _Enough(Exception):
    """Ends a forward pass once everything wanted was captured."""


class Transfer:
    """One transfer of all sites: holds the teacher's activations between the sites, once one is fitted."""

    def __init__(
        self,
        teacher: nn.Module,
        sites: list[FFNSite],
        calibration: Iterable[Any],
        call: Callable[[nn.Module, Any], Any],
        progress: Callable[[str], None] | None = None,
    ) -> None:
        if isinstance(calibration, Iterator):
            raise ValueError(
                "calibration is an iterator that can be read only once, and transfer reads it once "
                "per block: pass a list of batches or a DataLoader"
            )
        self.teacher, self.sites = teacher, sites
        self.calibration, self.call = calibration, call
        self.progress = progress
        self._wanted: dict[str, list[Tensor]] = {}
        self._first_inputs: list[Tensor] = []

    def fit(
        self,
        student: nn.Module,
        site: FFNSite,
        config: LayerConfig,
        refine_steps: int,
        generator: torch.Generator,
    ) -> tuple[FFNLayer, float | None]:
        """Fit the layer for one site of the partly replaced student; returns it with its held-out R².

        The R² is None for a layer that needs no calibration.
        """
        if not config.needs_calibration:
            return config.fit(site.dense, (), generator=generator), None
        if not self._wanted:
            with _evaluating(self.teacher):
                self._wanted = self._teacher_sums()
        gamma = _output_weight(site, student)
        with _evaluating(student):
            chunks = list(self._chunks(student, site))
        train, held_out = _split(chunks)
        layer = config.fit_and_refine(
            site.dense,
            train,
            steps=refine_steps,
            judge=lambda candidate: fit_quality(candidate, held_out, gamma),
            generator=generator,
            output_weight=gamma,
        )
        r2 = fit_quality(layer, held_out, gamma)
        if self.progress is not None:
            self.progress(
                f"block {self.sites.index(site) + 1}/{len(self.sites)} {site.name}: held-out R² {r2:.4f}"
            )
        return layer, r2

    @torch.no_grad()
    def _teacher_sums(self) -> dict[str, list[Tensor]]:
        """Per site and batch what the student should arrive at: the stream after the block, or its output."""
        wanted: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}
        batches = 0
        for batch in self.calibration:
            batches += 1
            with _capturing(self.teacher, self.sites) as seen:
                self.call(self.teacher, batch)
            if (self.sites[0].name, "input") in seen:
                self._first_inputs.append(seen[self.sites[0].name, "input"])
            for site in self.sites:
                stream, output = seen.get((site.name, "stream")), seen.get((site.name, "output"))
                if output is None:
                    raise ValueError(
                        f"block {site.name} did not run when the model was called with the calibration data"
                    )
                _require_finite(output, site)
                wanted[site.name].append(output if stream is None else stream + output)
        if not batches:
            raise ValueError("the calibration data are empty: give at least one batch of model inputs")
        return wanted

    @torch.no_grad()
    def _chunks(self, student: nn.Module, site: FFNSite) -> Iterator[Chunk]:
        """Inputs, targets and token weights of one site, a chunk per batch."""
        wanted = self._wanted[site.name]
        batches = 0
        for batch in self.calibration:
            batches += 1
            if batches > len(wanted):
                continue  # counted for the message below
            want = wanted[batches - 1]
            with _capturing(student, [site], stop=True) as seen, suppress(_Enough):
                self.call(student, batch)
            x, stream = seen[site.name, "input"], seen.get((site.name, "stream"))
            if len(x) != len(want) or not self._read_before(x, site, batches - 1):
                raise ValueError(
                    "the calibration data change from one reading to the next: switch shuffling off"
                )
            weight = None
            if site.norm is not None:
                weight = 1 / want.var(-1, correction=0).clamp(min=1e-12)
            _require_finite(x, site)
            yield x, want if stream is None else want - stream, weight
        if batches != len(wanted):
            raise ValueError(f"the calibration data gave {len(wanted)} batches first and {batches} later")

    def _read_before(self, x: Tensor, site: FFNSite, batch: int) -> bool:
        """Whether the first site's input, which no replacement changes, is what the teacher was given."""
        if site is not self.sites[0]:
            return True
        return torch.allclose(x, self._first_inputs[batch], rtol=1e-2, atol=1e-2, equal_nan=True)


def _output_weight(site: FFNSite, model: nn.Module) -> Tensor | None:
    """γ² of the LayerNorm that follows: how much each output dimension matters behind it."""
    if site.norm is None:
        return None
    gamma = model.get_submodule(site.norm).weight
    return gamma.detach().square() if isinstance(gamma, Tensor) else None


def _split(chunks: list[Chunk]) -> tuple[list[Chunk], list[Chunk]]:
    train, held_out = [], []
    for x, y, weight in chunks:
        cut = len(x) - max(1, len(x) // HELD_OUT) if len(x) > 1 else len(x)
        train.append((x[:cut], y[:cut], None if weight is None else weight[:cut]))
        held_out.append((x[cut:], y[cut:], None if weight is None else weight[cut:]))
    return train, held_out


def _require_finite(values: Tensor, site: FFNSite) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(
            f"the calibration data give NaN or infinity at block {site.name}: check the batches and "
            "the model's weights"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _capturing(
    model: nn.Module, sites: list[FFNSite], *, stop: bool = False
) -> Iterator[dict[tuple[str, str], Tensor]]:
    """Collect `[T, d]` activations of sites during a forward pass; with `stop`, end it at the last input."""
    seen: dict[tuple[str, str], Tensor] = {}
    handles = []

    def keep(site: FFNSite, what: str, value: Tensor) -> None:
        if (site.name, what) in seen:
            raise ValueError(shared_block(model, site))
        # A copy: what follows may write into the tensor in place, as nn.ReLU(inplace=True) does.
        seen[site.name, what] = value.detach().reshape(-1, value.shape[-1]).clone()

    def before(site: FFNSite, what: str) -> Callable:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            keep(site, what, args[0])
            if stop and what == "input":
                raise _Enough

        return hook

    def after(site: FFNSite) -> Callable:
        return lambda _module, _args, output: keep(site, "output", output)

    def listen(site: FFNSite) -> None:
        if site.stream is not None:  # before the input's hook: both may sit on one module
            handles.append(model.get_submodule(site.stream).register_forward_pre_hook(before(site, "stream")))
        handles.append(model.get_submodule(site.name).register_forward_pre_hook(before(site, "input")))
        if not stop:
            handles.append(model.get_submodule(site.output).register_forward_hook(after(site)))

    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        # torch's fused encoder runs past the modules, and packs padded batches.
        torch.backends.mha.set_fastpath_enabled(False)
        for site in sites:
            listen(site)
        yield seen
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()

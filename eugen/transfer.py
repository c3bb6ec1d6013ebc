"""Transfer of a trained network's knowledge, block by block, in closed form.

Each block is fitted on the activations of the already replaced network, against a target that
also makes up for what the residual stream lost: `teacher(stream + y) − stream of the student`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eugen import parallel
from eugen.activations import Activations, ActivationsWriter, Kept, Store
from eugen.capture import capturing, evaluating, explaining, listening
from eugen.config import LayerConfig
from eugen.ffn import FFNLayer
from eugen.least_squares import FEW_TOKENS_PER_FEATURE, HELD_OUT, fit_quality
from eugen.sites import FFNSite
from eugen.sites.faults import SiteFault, did_not_run, too_few_tokens

SUMS_SHARE = 0.5
"""Part of the memory that the teacher's sums may use: a block's own chunks are read more often."""


def default_call(model: nn.Module, batch: Any) -> Any:
    """`model(batch)`."""
    return model(batch)


class Transfer:
    """One transfer of all sites: keeps the teacher's activations until the block that wants them is fitted.

    Args:
        sites: all that are replaced, front to back.
        wanted: those of them that `fit` will be called for, in this order.
        store: where activations are kept; whoever gives it closes it.
        group: the processes that fit together, each with its own calibration data.
    """

    def __init__(
        self,
        teacher: nn.Module,
        sites: Sequence[FFNSite],
        calibration: Iterable[Any],
        call: Callable[[nn.Module, Any], Any],
        *,
        wanted: Sequence[FFNSite],
        store: Store,
        group: parallel.Group | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        if isinstance(calibration, Iterator):
            raise ValueError(
                "calibration is an iterator that can be read only once, and transfer reads it once "
                "per block: pass a list of batches or a DataLoader"
            )
        self.teacher, self.sites, self.wanted = teacher, sites, wanted
        self.calibration, self.call = calibration, call
        self.store, self.group, self.progress = store, group, progress
        self._sums: dict[str, list[Kept]] = {}
        self._first_inputs: list[Kept] = []
        self._short: list[tuple[FFNSite, int, int]] = []
        """Blocks with too few tokens: the block, its tokens, its features."""

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
        with parallel.failing_together(self.group, f"the activations of block {site.name}"):
            if not self._sums:
                with evaluating(self.teacher):
                    self._keep_sums()
            with evaluating(student):
                train, held_out = self._activations(student, site)
        gamma = output_weight(site, student)
        with parallel.using(self.group):
            layer = config.fit_and_refine(
                site.dense,
                train,
                steps=refine_steps,
                judge=lambda candidate: fit_quality(candidate, held_out, gamma),
                generator=generator,
                output_weight=gamma,
            )
            parallel.make_equal(layer)
            r2 = fit_quality(layer, held_out, gamma)
            tokens = int(parallel.total_of(train.tokens)[0])
        if tokens < FEW_TOKENS_PER_FEATURE * layer.num_features:
            self._short.append((site, tokens, layer.num_features))
        train.free()
        held_out.free()
        if self.progress is not None:
            self.progress(
                f"block {self.sites.index(site) + 1}/{len(self.sites)} {site.name}: held-out R² {r2:.4f}"
            )
        return layer, r2

    def warn_of_few_tokens(self) -> None:
        """Warn the caller's caller where a block had fewer than two tokens a feature."""
        if self._short:
            warnings.warn(too_few_tokens(self._short, of=len(self.sites)), stacklevel=3)

    @torch.no_grad()
    def _keep_sums(self) -> None:
        """Per site and batch what the student should arrive at: the stream after the block, or its output."""
        self._sums = {site.name: [] for site in self.wanted}
        waiting: dict[str, Tensor] = {}
        reached: set[str] = set()

        def keep(site: FFNSite, what: str, value: Tensor) -> None:
            if what == "input":
                reached.add(site.name)
                if site is self.sites[0]:
                    self._first_inputs.append(self.store.keep(value, share=SUMS_SHARE))
                return
            if what == "output":
                require_finite(value, site)
            if site.stream is not None and site.name not in waiting:
                waiting[site.name] = value
                return
            total = value if site.stream is None else wide(waiting.pop(site.name)) + wide(value)
            self._sums[site.name].append(self.store.keep(total, share=SUMS_SHARE))

        batches = 0
        for batch in self.calibration:
            batches += 1
            reached.clear()
            with (
                listening(self.teacher, self.wanted, keep),
                explaining("the model", batches, batch, self.wanted, reached),
            ):
                self.call(self.teacher, batch)
            for site in self.wanted:
                if len(self._sums[site.name]) < batches:
                    raise ValueError(did_not_run(site))
        if not batches:
            raise ValueError("the calibration data are empty: give at least one batch of model inputs")

    @torch.no_grad()
    def _activations(self, student: nn.Module, site: FFNSite) -> tuple[Activations, Activations]:
        """What one site is fitted to, and what it is judged on: the last part of every batch."""
        train, held_out = ActivationsWriter(self.store), ActivationsWriter(self.store)
        sums, batches = self._sums[site.name], 0
        for batch in self.calibration:
            batches += 1
            if batches > len(sums):
                continue  # counted for the message below
            with (
                capturing(student, [site], stop=True) as seen,
                explaining("the partly replaced model", batches, batch, [site], ()),
            ):
                self.call(student, batch)
            x, stream = seen[site.name, "input"], seen.get((site.name, "stream"))
            want = sums[batches - 1].read()
            if len(x) != len(want) or not self._read_before(x, site, batches - 1):
                raise ValueError(
                    "the calibration data change from one reading to the next: switch shuffling off"
                )
            require_finite(x, site)
            weight = None
            if site.norm is not None:
                weight = 1 / want.var(-1, correction=0).clamp(min=1e-12)
            y = want if stream is None else want - stream
            sums[batches - 1].free()
            cut = len(x) - max(1, len(x) // HELD_OUT) if len(x) > 1 else len(x)
            for writer, part in ((train, slice(cut)), (held_out, slice(cut, None))):
                writer.add(x[part], y[part], None if weight is None else weight[part])
        if batches != len(sums):
            raise ValueError(f"the calibration data gave {len(sums)} batches first and {batches} later")
        return train.finish(), held_out.finish()

    def _read_before(self, x: Tensor, site: FFNSite, batch: int) -> bool:
        """Whether the first site's input, which no replacement changes, is what the teacher was given."""
        if site is not self.sites[0]:
            return True
        first = self._first_inputs[batch]
        alike = torch.allclose(x, first.read(), rtol=1e-2, atol=1e-2, equal_nan=True)
        first.free()
        return alike


def output_weight(site: FFNSite, model: nn.Module) -> Tensor | None:
    """γ² of the LayerNorm that follows: how much each output dimension matters behind it."""
    if site.norm is None:
        return None
    gamma = model.get_submodule(site.norm).weight
    return gamma.detach().square() if isinstance(gamma, Tensor) else None


def require_finite(values: Tensor, site: FFNSite) -> None:
    """Raise SiteFault where a block's activations are not finite."""
    if not torch.isfinite(values).all():
        raise SiteFault(
            f"the calibration data give NaN or infinity at block {site.name}: check the batches and "
            "the model's weights"
        )


def wide(values: Tensor) -> Tensor:
    """At least float32: sums and differences with the residual stream lose a narrow dtype's digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))

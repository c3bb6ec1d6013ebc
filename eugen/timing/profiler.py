"""Every row of a model against the dense model of the same dtype, in one process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from eugen.cost import CallCost, call_cost
from eugen.timing.clock import Clock
from eugen.timing.energy import Energy, energy_per_call
from eugen.timing.environment import environment, load
from eugen.timing.memory import Memory, peak_memory
from eugen.timing.placements import PLACEMENTS, PlacedLatency, compare_models, placed
from eugen.timing.record import CUT, FAILED, REFUSED, TIMED, Measured, Profile, Row
from eugen.timing.roofline import Rates, measure_rates
from eugen.timing.rows import CONTROL, RowName, build, compare_outputs, config_of
from eugen.timing.subjects import Part, Subject, block_inputs, moved, parts
from eugen.timing.trace import write_trace

COMPILED_ERROR = {torch.float32: 1e-4}
"""Relative RMS of a compiled model's output beside the eager one's; others are half precision."""
COMPILED_COARSEST = 5e-2


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        budget: fraction of the dense blocks' MACs.
        device, dtype: of the dense model and of every row.
        batches, calls, scopes: every combination is a condition.
        placements, pairs: see `compare_models`; seconds: for the pairs of one row under one condition.
        cold, cuda_graph: see `Clock`.
        energy_seconds: repeat a call so long for its energy; 0 leaves it out.
        trace: folder for a trace of each row.
        total_seconds: rows not begun by then are listed as cut, but for the control. None: no end.
    """

    budget: float = 0.3
    device: str = "cpu"
    dtype: str = "float32"
    batches: tuple[int, ...] = (1,)
    calls: tuple[str, ...] = ("forward",)
    scopes: tuple[str, ...] = ("model",)
    placements: int = PLACEMENTS
    pairs: int = 20
    seconds: float = 10.0
    confidence: float = 0.95
    cold: bool = False
    cuda_graph: bool = False
    energy_seconds: float = 1.0
    trace: Path | None = None
    total_seconds: float | None = None


@dataclass(frozen=True)
class Condition:
    """One call on one batch of one part; the dense part and its cost are measured once for all rows."""

    call: str
    batch: int
    scope: str
    part: Part


def profile_model(
    subject: Subject,
    rows: list[RowName],
    settings: Settings,
    progress: Callable[[Profile], None] = lambda so_far: None,
) -> Profile:
    """Measure every row under every condition. A row that breaks is listed and hides no other.

    Args:
        rows: of `eugen.timing.rows.parse_rows`; the control, the model against its own copy, comes first.
        progress: called with the profile so far after each measurement; its last row is the new one.

    Raises:
        ValueError: a condition that the model's inputs do not have.
    """
    start = time.perf_counter()
    started = Profile(
        model=subject.name,
        device=settings.device,
        dtype=settings.dtype,
        settings={**asdict(settings), "trace": str(settings.trace) if settings.trace else None},
        environment=environment(settings.device),
        rates=measure_rates(settings.device, settings.dtype),
    )
    bench = _Bench(subject, settings, started.rates)
    found: list[Row] = []

    def so_far() -> Profile:
        return started.ended(list(found), bench.rates, load(), time.perf_counter() - start)

    for row in rows:
        for result in bench.row(row):
            found.append(result)
            progress(so_far())
    return so_far()


def line_of(row: Row) -> str:
    """A row in one line."""
    place = f"{row.call} batch {row.batch} {row.part} {row.row}"
    if row.measured is None:
        return f"{place}: {row.status}: {row.reason}"
    m = row.measured
    return f"{place}: {m.speedup:.2f} [{m.low:.2f}, {m.high:.2f}]"


class _Bench:
    """The dense model on its device, and what all rows share."""

    def __init__(self, subject: Subject, settings: Settings, rates: Rates) -> None:
        self.subject, self.settings, self.rates = subject, settings, rates
        self.dtype = getattr(torch, settings.dtype)
        self.dense = subject.model.to(settings.device, self.dtype).eval()
        self.clock = Clock(settings.device, cold=settings.cold, cuda_graph=settings.cuda_graph)
        self._examples: dict[tuple[str, int], Any] = {}
        self._dense_macs: dict[tuple[str, int, str], int] = {}
        self._seen: dict[tuple[str, int, str, str], None] = {}
        total = math.inf if settings.total_seconds is None else settings.total_seconds
        self._end = time.perf_counter() + total

    def conditions(self) -> Iterator[Condition]:
        for call in self.settings.calls:
            for batch in self.settings.batches:
                example = self._example(call, batch)
                for scope in self.settings.scopes:
                    for part in parts(self.dense, example, scope):
                        self._seen[call, batch, scope, part.name] = None
                        yield Condition(call, batch, scope, part)

    def row(self, row: RowName) -> Iterator[Row]:
        """The row under every condition; a layer is built once, and fails once for all of them."""
        if self._is_late(row):
            yield from self._cut(row, set())
            return
        try:
            model, error = build(row.layer, self.dense, self.settings.budget, self._check_inputs(row))
        except Exception as failure:
            for c in self.conditions():
                yield _broken(row, c, failure)
            return
        done: set[tuple[str, int, str, str]] = set()
        for c in self.conditions():
            if self._is_late(row):
                yield from self._cut(row, done)
                return
            done.add((c.call, c.batch, c.scope, c.part.name))
            try:
                measured = self._measure(row, model, error, c)
                yield Row(row.name, c.call, c.batch, c.scope, c.part.name, TIMED, measured=measured)
            except Exception as failure:
                yield _broken(row, c, failure)

    def _is_late(self, row: RowName) -> bool:
        return row.name != CONTROL and time.perf_counter() > self._end

    def _cut(self, row: RowName, done: set[tuple[str, int, str, str]]) -> Iterator[Row]:
        """The row under the conditions that the control ran under, but for those that are done."""
        reason = f"not begun: {self.settings.total_seconds:.0f} s were up"
        for place in self._seen:
            if place not in done:
                yield Row(row.name, *place, CUT, reason=reason)

    def _measure(self, row: RowName, model: nn.Module, error: float, c: Condition) -> Measured:
        base, eager, example = c.part.of(self.dense), c.part.of(model), c.part.example
        cost = call_cost(lambda: eager(example), eager)
        run: Any = eager
        if row.compiled:
            torch.compiler.reset()  # rows share code; one more graph of it and torch would run it uncompiled
            run = torch.compile(eager, dynamic=False)
            error = max(error, self._check_compiled(run, eager, example))
        timed = compare_models(
            placed(base, example, _call),
            placed(run, example, _call, in_place=row.compiled),
            placements=self.settings.placements,
            pairs=self.settings.pairs,
            max_seconds=self.settings.seconds,
            clock=self.clock,
        )
        ready = self.clock.prepare(lambda: run(example))
        return self._described(row, c, timed, cost, error, self._memory(row, run, eager, example), ready)

    def _described(
        self,
        row: RowName,
        c: Condition,
        timed: PlacedLatency,
        cost: CallCost,
        error: float,
        memory: Memory,
        ready: Any,
    ) -> Measured:
        place = (c.call, c.batch, c.part.name)
        macs = cost.total_macs
        if row.name == CONTROL:
            self._dense_macs[place] = macs
        self.rates = self.rates.knowing(cost.macs, self.settings.device)
        limit = self.rates.limit(cost)
        speedup, low, high = timed.speedup(self.settings.confidence)
        row_ms = statistics.median(timed.other_ms)
        named = "-".join((row.name, c.call, f"batch{c.batch}", c.part.name))
        folder, config = self.settings.trace, config_of(row.layer, self.settings.budget)
        return Measured(
            speedup=speedup,
            low=low,
            high=high,
            scatter=timed.scatter(),
            dense_ms=statistics.median(timed.base_ms),
            row_ms=row_ms,
            samples=timed,
            macs=cost.macs,
            weight_bytes=cost.weight_bytes,
            io_bytes=cost.io_bytes,
            activation_bytes=cost.activation_bytes,
            macs_limit=self._dense_macs[place] / macs if macs and place in self._dense_macs else None,
            limit_ms=limit.ms,
            binds=limit.binds,
            of_limit=limit.ms / row_ms,
            memory=memory,
            energy=self._energy(ready),
            check_error=error,
            config=repr(config),
            trace=str(write_trace(ready, folder, named, device=self.settings.device)) if folder else None,
        )

    def _memory(self, row: RowName, run: Any, eager: nn.Module, example: Any) -> Memory:
        # Compiled code shows no tensors that could be counted; a GPU's allocator counts by itself.
        counted = not row.compiled or self.settings.device.startswith("cuda")
        return peak_memory(lambda: run(example), eager, device=self.settings.device, counted=counted)

    def _energy(self, ready: Callable[[], Any]) -> Energy:
        if not self.settings.energy_seconds:
            return Energy(None, None, "not asked for")
        return energy_per_call(ready, device=self.settings.device, seconds=self.settings.energy_seconds)

    @torch.no_grad()
    def _check_compiled(self, run: Any, eager: nn.Module, example: Any) -> float:
        allowed = COMPILED_ERROR.get(self.dtype, COMPILED_COARSEST)
        pairs = zip(_outputs(run(example)), _outputs(eager(example)), strict=True)
        return max(compare_outputs(actual, expected, allowed) for actual, expected in pairs)

    def _check_inputs(self, row: RowName) -> dict[str, torch.Tensor]:
        if row.layer == CONTROL:
            return {}
        return block_inputs(self.dense, self._example(self.settings.calls[0], self.settings.batches[0]))

    def _example(self, call: str, batch: int) -> Any:
        """Inputs on the device; made once: images of a large batch take longer to draw than to classify."""
        if (call, batch) not in self._examples:
            made = self.subject.inputs(call, batch)
            self._examples[call, batch] = moved(made, self.settings.device, self.dtype)
        return self._examples[call, batch]


def _call(model: nn.Module, example: Any) -> Any:
    return model(example)


def _outputs(result: Any) -> list[torch.Tensor]:
    return [
        leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    ]


def _broken(row: RowName, c: Condition, failure: Exception) -> Row:
    """A ValueError says what a row does not take, a device may be too small; anything else is a fault."""
    refused = isinstance(failure, (ValueError, torch.OutOfMemoryError))
    reason = str(failure) if refused else f"{type(failure).__name__}: {failure}"
    return Row(row.name, c.call, c.batch, c.scope, c.part.name, REFUSED if refused else FAILED, reason=reason)

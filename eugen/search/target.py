"""What a search is asked for, and that it cannot be had."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Target:
    """How cheap the model is to become; exactly one of these is given.

    Args:
        macs: fraction of the dense blocks' inference MACs, in (0, 1]. A block that sees more tokens in a call
            weighs more.
        parameters: fraction of the dense blocks' stored weights, in (0, 1].
        speedup: latency of the whole dense model over that of the compressed one, above 1.

    Raises:
        ValueError: none or several are given, or one outside its range.
    """

    macs: float | None = None
    parameters: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if len(given) != 1:
            said = ", ".join(f"{name}={value}" for name, value in given.items()) or "nothing"
            raise ValueError(f"a target is one of macs=, parameters= and speedup=, given was {said}")
        (name, value), fraction = next(iter(given.items())), self.speedup is None
        if fraction and not 0 < value <= 1:
            raise ValueError(f"{name}={value} must be in (0, 1]: a fraction of the dense blocks'")
        if not fraction and not 1 < value < float("inf"):
            raise ValueError(f"speedup={value} must be above 1: the dense model's latency over the new one's")

    @property
    def kind(self) -> str:
        """Which one is given: "macs", "parameters" or "speedup"."""
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def value(self) -> float:
        """The one that is given."""
        return getattr(self, self.kind)


class Unreachable(ValueError):
    """No plan reaches the target.

    Args:
        target: the one asked for.
        best: the closest that can be reached, in the target's own unit.
        hint: why, or what to do.
    """

    def __init__(self, target: Target, best: float, hint: str = "") -> None:
        self.target, self.best = target, best
        super().__init__(
            f"{target.kind}={target.value} is out of reach: the best reachable is {best:.4g}"
            + (f"; {hint}" if hint else "")
        )

"""The choice for each block."""

from eugen.search.target import Target, Unreachable

__all__ = ["Target", "Unreachable"]

"""The commands that test claims at the papers' own size, each on a machine with a GPU."""

from __future__ import annotations

from stages.reporting import text
from stages.reporting.findings import Finding

COMMANDS = {
    "language": "make bench PROFILE=gpu_language",
    "vision": "make bench PROFILE=gpu_imagenet",
    "radiance": "make bench PROFILE=gpu_radiance",
    "distance": "make bench PROFILE=gpu_distance",
}
"""By task. A profile stands in params/<name>.yaml."""


def open_at_full_size(*tasks: str) -> list[Finding]:
    """What stays open until somebody runs it, with the command."""
    commands = text.listing(list(dict.fromkeys(f"`{COMMANDS[task]}`" for task in tasks)))
    return [Finding(text.NONE, f"at the papers' size, needs a GPU: {commands}", "open")]

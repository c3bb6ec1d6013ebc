"""Latency, memory, energy and limits of models, measured side by side; `python -m eugen.timing --help`.

docs/profiling.md says what each number means.
"""

from eugen.timing.clock import Clock
from eugen.timing.energy import Energy, energy_per_call
from eugen.timing.latency import PairedLatency, compare
from eugen.timing.memory import Memory, peak_bytes, peak_memory
from eugen.timing.placements import PlacedLatency, compare_models, placed
from eugen.timing.profiler import Settings, profile_model
from eugen.timing.record import Environment, Measured, Profile, Row
from eugen.timing.roofline import Limit, Rates, copy_rate
from eugen.timing.subjects import Subject
from eugen.timing.trace import write_trace

__all__ = [
    "Clock",
    "Energy",
    "Environment",
    "Limit",
    "Measured",
    "Memory",
    "PairedLatency",
    "PlacedLatency",
    "Profile",
    "Rates",
    "Row",
    "Settings",
    "Subject",
    "compare",
    "compare_models",
    "copy_rate",
    "energy_per_call",
    "peak_bytes",
    "peak_memory",
    "placed",
    "profile_model",
    "write_trace",
]

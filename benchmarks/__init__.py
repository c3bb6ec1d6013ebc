"""Measurements of the library itself: `python -m benchmarks.layers`, `python -m benchmarks.estimator`.

They need torch and the standard library only, so that they run on a bare machine.
"""

"""Kill a benchmark at random moments, run it again, and compare with a run that nobody disturbed.

`python -m benchmarks.crash --kills 30 --seed 0`; exit code 1 if anything was lost.
"""

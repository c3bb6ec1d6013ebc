"""Is the working tree slower, larger or less exact than a commit?

`python -m benchmarks.regression --base REF` answers. Both are measured anew, interleaved, each by a process
of its own; nothing is compared with stored times. docs/benchmarks.md says how to read the verdict.
"""

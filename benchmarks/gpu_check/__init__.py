"""All GPU figures in one command: `python -m benchmarks.gpu_check`, or `make gpu-check`.

It needs torch, and timm for one model. docs/benchmarks.md says how to read what it writes.
"""

"""Operators of their own: one folder each, `naive.py` the truth, `fused.py` (Triton) the speed."""

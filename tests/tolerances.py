"""How close is close: the one table, as relative root mean square error per dtype.

Changing an entry needs its reason in the commit.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_RMS = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    # Steps of 1/127 of the largest entry, 4 deviations: 1/√12 of one is 0.9 %, four times in two products.
    torch.int8: 3e-2,
}


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of what is expected, in float64; the bare RMS where that is 0."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    error = torch.linalg.vector_norm(actual.detach().double() - expected.detach().double())
    size = torch.linalg.vector_norm(expected.detach().double())
    return float(error / size) if size > 0 else float(error)


def assert_close(
    actual: Tensor, expected: Tensor, what: str = "tensors", *, precision: torch.dtype = torch.float64
) -> None:
    """Agreement as good as the coarsest of the two dtypes and of the products' precision allows."""
    allowed = max(RELATIVE_RMS[dtype] for dtype in (actual.dtype, expected.dtype, precision))
    error = relative_rms(actual, expected)
    assert error <= allowed, f"{what}: relative RMS error {error:.2e} is above {allowed:.0e}"

"""What tells that a file read as uint16 ids holds something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stages.data.verify import DataError

LEAST_JUDGED = 64
"""Ids below which nothing is said."""
PRINTABLE = np.array([9, 10, 13, *range(32, 127)])
TEXT_SHARE = 0.9
"""With more bytes of ASCII text than that a file is text. Of uint16 ids about a third of the lower bytes are
such, and the upper ones of a small vocabulary are 0 or nearly so."""
LEAST_COMPARED = 1 << 14
ALIKE, UNEVEN = 0.1, 0.2
"""Lower and upper bytes of so many ids are of one distribution if their total variation distance is below the
first. Chance alone makes it 0.07 in pairs of 16384 bytes; ids below 50257 that are all equally frequent, as
alike as a tokenizer's get, 0.23. Only bytes farther than the second from the uniform distribution are judged:
ids spread evenly over all 65536 have even bytes in both halves too."""


def check(path: Path, ids: np.ndarray) -> None:
    """Refuse a stretch of a token file whose ids were not written as uint16.

    Args:
        ids: as read, uint16 `[n]`.

    Raises:
        DataError: they are overwhelmingly likely halves of ids of 32 or 64 bits, plain text, or pairs of ids
            of 8 bits.
    """
    if len(ids) < LEAST_JUDGED:
        return
    # In a file of 32 or 64 bits a token every second 16-bit word is the empty upper half.
    if not (ids[::2].any() and ids[1::2].any()):
        raise DataError(
            f"token file {path}: every second id is 0, as if it held ids of 32 or 64 bits: "
            "write it again as uint16"
        )
    counts = np.bincount(ids, minlength=1 << 16).reshape(256, 256)  # rows: upper bytes
    shares = np.stack([counts.sum(1), counts.sum(0)]) / len(ids)
    if shares[:, PRINTABLE].sum() / 2 > TEXT_SHARE:
        raise DataError(
            f"token file {path} is plain text, not ids: make ids of it with nanoGPT's prepare.py, or set "
            "data.source to text and data.path to this file"
        )
    apart = np.abs(shares[0] - shares[1]).sum() / 2
    uneven = np.abs(shares.mean(0) - 1 / 256).sum() / 2
    if len(ids) >= LEAST_COMPARED and apart < ALIKE and uneven > UNEVEN:
        raise DataError(
            f"token file {path}: upper and lower bytes are distributed alike, as if it held ids of 8 bits "
            "(uint8) or text: write it again as uint16"
        )

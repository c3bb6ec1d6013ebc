"""`.npy` files, read without NumPy, against what NumPy wrote."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eugen.cli.arrays import read_arrays, read_npy


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"]
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_what_numpy_wrote_is_read(tmp_path, dtype, version):
    array = (np.arange(24).reshape(2, 3, 4) % 5).astype(dtype)
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, array, version=version)
    found = read_npy(tmp_path / "a.npy")
    assert str(found.dtype) == f"torch.{dtype}" and found.shape == (2, 3, 4)
    assert torch.equal(found, torch.from_numpy(array))


def test_an_empty_array(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((0, 3)))
    assert read_npy(tmp_path / "a.npy").shape == (0, 3)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.asfortranarray(np.ones((3, 2))), "in Fortran order"),
        (np.ones(3, dtype=complex), "of dtype '<c16'"),
        (np.ones(3, dtype=">f4"), "of dtype '>f4'"),
        (np.ones(3, dtype=[("x", "<f4")]), r"of dtype \[\('x', '<f4'\)\]"),
        (np.ones(()), "is a single number"),
    ],
)
def test_what_is_not_read_is_said(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        read_arrays(tmp_path / "a.npy")


def test_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"of dtype '\|O'"):
        read_npy(tmp_path / "a.npy")


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: d[:30], lambda d: b"x" + d]
)
def test_damaged_files_are_refused(tmp_path, change):
    np.save(tmp_path / "a.npy", np.ones((3, 2)))
    (tmp_path / "a.npy").write_bytes(change((tmp_path / "a.npy").read_bytes()))
    with pytest.raises(ValueError, match=r"is damaged|is no \.npy file"):
        read_arrays(tmp_path / "a.npy")

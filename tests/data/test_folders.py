"""Folders of photographs, their parts, and the file that holds them, on miniature sets made here."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from stages.data import parts
from stages.data.folders import ImageFolder, decode
from stages.data.parts import DecodedImages
from stages.data.verify import DataError

IMAGENETTE = ["n01440764", "n02102040", "n02979186"]


def colour(number: int) -> tuple[int, int, int]:
    return (40 * number % 256, 255 - 20 * number, 7 * number)


def make(root: Path, counts: dict[str, int], suffix: str = ".png", first: int = 0) -> Path:
    """So many plain images in each folder, every one of its own size and colour."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            number = first + index
            image = Image.new("RGB", (9 + number, 13 + 2 * number), colour(number))
            image.save(root / name / f"{number:03}{suffix}")
        first += count
    return root


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 98} if kind == "JPEG" else {}))
    return out.getvalue()


def plain(source: ImageFolder) -> list[tuple[int, ...]]:
    """The one colour of each image."""
    images = np.concatenate(list(source.read(np.arange(len(source.labels)))))
    assert (images == images[:, :1, :1]).all()
    return [tuple(map(int, image[0, 0])) for image in images]


def test_imagenet_s_layout_has_an_official_test_split(tmp_path):
    make(tmp_path / "train", dict(zip(reversed(IMAGENETTE), (2, 1, 3), strict=True)), ".PNG")
    make(tmp_path / "val", dict.fromkeys(IMAGENETTE, 2), first=6)
    source = ImageFolder(tmp_path, 8)
    assert source.classes == IMAGENETTE and source.official == 6 and source.shape == (8, 8, 3)
    assert source.labels.tolist() == [0, 0, 0, 1, 2, 2, 0, 0, 1, 1, 2, 2]
    assert plain(source) == [colour(n) for n in (3, 4, 5, 2, 0, 1, *range(6, 12))]


def test_train_alone_and_classes_alone_have_none(tmp_path):
    for root, inner in (("parted", "train"), ("single", "")):
        make(tmp_path / root / inner, {"River": 2, "Forest": 1})
        source = ImageFolder(tmp_path / root, 8)
        assert source.classes == ["Forest", "River"] and source.official == 0
        assert plain(source) == [colour(n) for n in (2, 0, 1)]


def test_a_class_may_be_called_train(tmp_path):
    make(tmp_path, {"bus": 1, "train": 2})
    assert ImageFolder(tmp_path, 8).classes == ["bus", "train"]


def test_other_files_are_passed_over(tmp_path):
    make(tmp_path, {"a": 2})
    (tmp_path / "a/readme.txt").write_text("no image")
    assert len(ImageFolder(tmp_path, 8).labels) == 2


def test_an_image_as_high_as_the_side_loses_its_margins_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 16, 3), dtype=np.uint8)
    assert np.array_equal(decode(encoded(Image.fromarray(pixels)), 10), pixels[:, 3:13])
    turned = np.ascontiguousarray(pixels.transpose(1, 0, 2))
    assert np.array_equal(decode(encoded(Image.fromarray(turned)), 10), turned[3:13])


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("factor", [2, 8])
def test_a_ramp_is_still_a_ramp_at_the_lower_size(kind, factor):
    side = 32
    ramp = np.broadcast_to(np.linspace(0, 255, factor * side), (factor * side, factor * side))
    small = decode(encoded(Image.fromarray(ramp.round().astype(np.uint8)), kind), side).astype(float)
    # The centre of pixel j stands at factor·(j + ½) − ½ of the large image; cubics overshoot at the edges.
    expected = 255 * (factor * (np.arange(side) + 0.5) - 0.5) / (factor * side - 1)
    assert np.abs(small - expected[None, :, None])[:, 2:-2].max() < 2.5


@pytest.mark.parametrize(
    ("mode", "value", "expected", "kind"),
    [
        ("L", 77, (77, 77, 77), "PNG"),
        ("1", 1, (255, 255, 255), "PNG"),
        ("LA", (77, 10), (77, 77, 77), "PNG"),
        ("RGBA", (10, 200, 30, 128), (10, 200, 30), "PNG"),
        ("L", 77, (77, 77, 77), "JPEG"),
        ("CMYK", (0, 51, 102, 51), (204, 163, 122), "JPEG"),  # 255 · (1 − ink) · (1 − black)
    ],
)
def test_every_kind_of_image_becomes_rgb(mode, value, expected, kind):
    pixels = decode(encoded(Image.new(mode, (20, 14), value), kind), 8)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= (2 if kind == "JPEG" else 0)


def test_palettes_become_their_colours():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 5).convert("P")
    image.putpalette([channel for number in range(256) for channel in (number, 255 - number, 9)])
    number = np.asarray(image).astype(int)
    expected = np.stack([number, 255 - number, np.full_like(number, 9)], -1)
    assert np.array_equal(decode(encoded(image), 8), expected)


def broken(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("odd.jpg", b"no image at all", "cannot identify"),
        ("odd.jpg", broken(encoded(Image.effect_noise((64, 64), 90), "JPEG")), "truncated"),
        ("odd.png", broken(encoded(Image.effect_noise((64, 64), 90))), ""),
        ("odd.png", encoded(Image.fromarray(np.full((9, 9), 40_000, np.uint16))), "mode I;16.*8 bits"),
        ("odd.jpg", b"", "cannot identify"),
    ],
)
def test_an_unreadable_image_is_named(tmp_path, name, content, says):
    (make(tmp_path, {"a": 2}) / "a" / name).write_bytes(content)
    source = ImageFolder(tmp_path, 8)
    with pytest.raises(DataError, match=f"odd.* cannot be read .*{says}.*replace or delete it"):
        list(source.read(np.arange(3)))


def test_faults_of_the_folder_are_told(tmp_path):
    with pytest.raises(DataError, match="nowhere: there is no such folder; set data.folder"):
        ImageFolder(tmp_path / "nowhere", 8)
    with pytest.raises(DataError, match="Couldn't find any class folder"):
        ImageFolder(tmp_path, 8)
    make(tmp_path / "train", {"a": 1, "b": 1})
    make(tmp_path / "val", {"a": 1, "c": 1})
    with pytest.raises(DataError, match="class 'b' is in one of train and val only"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "train/empty").mkdir()
    with pytest.raises(DataError, match="no valid file for the classes empty"):
        ImageFolder(tmp_path, 8)
    flat = make(tmp_path / "flat/train", {"a": 1}).parent
    (flat / "val").mkdir()
    shutil.copy(flat / "train/a/000.png", flat / "val/ILSVRC2012_val_00000001.png")
    with pytest.raises(DataError, match="flat/val: Couldn't find any class folder"):
        ImageFolder(flat, 8)


def test_the_digest_tells_names_and_contents_but_not_the_order_of_reading(tmp_path):
    def digest(root: Path, rows: list[int]) -> str:
        source = ImageFolder(root, 8)
        list(source.read(np.array(rows)))
        assert source.rows == len(rows)
        return source.sha256

    one = make(tmp_path / "one", {"a": 3})
    first = digest(one, [0, 1, 2])
    assert digest(one, [2, 0, 1]) == first != digest(one, [0, 1])
    other = Path(shutil.copytree(one, tmp_path / "other"))
    assert digest(other, [0, 1, 2]) == first
    (other / "a/002.png").rename(other / "a/003.png")
    assert digest(other, [0, 1, 2]) != first
    (one / "a/002.png").write_bytes((one / "a/001.png").read_bytes())
    assert digest(one, [0, 1, 2]) != first


def numbered(count: int, classes: int, official: int = 0) -> DecodedImages:
    """Images that hold their own number, labels that go round."""
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    names = [f"class {number}" for number in range(classes)]
    return DecodedImages("test", images, np.arange(count) % classes, classes=names, official=official)


def split(source: DecodedImages, test: int, validation: int, limit: int | None = None) -> parts.Parts:
    return parts.split(source, test=test, validation=validation, limit=limit, where="tasks.x.data")


@pytest.mark.parametrize("official", [0, 20])
def test_parts_are_disjoint_and_hold_everything_for_training(official):
    source = numbered(100, 5, official)
    chosen = split(source, 15, 10)
    sizes = {name: len(rows) for name, rows in chosen.items()}
    assert sizes == {"test": 15, "validation": 10, "train": 100 - 25 - (5 if official else 0)}
    everything = np.concatenate(list(chosen.values()))
    assert len(set(everything.tolist())) == len(everything)
    inside = set(range(80, 100)) if official else set(range(100))
    assert set(chosen["test"].tolist()) <= inside
    if official:
        assert not inside & {*chosen["validation"].tolist(), *chosen["train"].tolist()}
    assert all(np.array_equal(chosen[name], again) for name, again in split(source, 15, 10).items())


@pytest.mark.parametrize("official", [0, 20])
def test_a_limit_counts_images_of_each_class(official):
    chosen = split(numbered(100, 5, official), 15, 10, limit=8)
    drawn = [chosen[name] for name in ("validation", "train", *([] if official else ["test"]))]
    assert Counter((np.concatenate(drawn) % 5).tolist()) == dict.fromkeys(range(5), 8)
    assert len(chosen["test"]) == 15


def test_too_few_images_are_an_error():
    with pytest.raises(
        DataError, match="tasks.x.data: test=60 and validation=40 leave nothing of 100 images"
    ):
        split(numbered(100, 5), 60, 40)
    with pytest.raises(DataError, match="test=30 and validation=10 leave nothing of 40 images"):
        split(numbered(100, 5), 30, 10, limit=8)
    with pytest.raises(DataError, match="tasks.x.data.test = 21: the official test split has 20 images"):
        split(numbered(100, 5, official=20), 21, 10)
    with pytest.raises(DataError, match="test=20 and validation=80 leave nothing"):
        split(numbered(100, 5, official=20), 20, 80)


def test_the_file_holds_the_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "CHUNK", 7)
    source = numbered(100, 5)
    chosen = split(source, 15, 10)
    parts.write(tmp_path / "images.safetensors", source, chosen)
    stored = load_file(tmp_path / "images.safetensors")
    assert set(stored) == {f"{part}.{kind}" for part in chosen for kind in ("images", "labels")}
    for part, rows in chosen.items():
        assert np.array_equal(stored[f"{part}.images"].numpy(), source.images[rows])
        assert np.array_equal(stored[f"{part}.labels"].numpy(), rows % 5)
    with safe_open(tmp_path / "images.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == source.classes


def test_a_set_that_the_disk_cannot_hold_is_refused_before_any_work(tmp_path, monkeypatch):
    source = ImageFolder(make(tmp_path / "set", {"a": 4, "b": 4}), 100)
    free = shutil.disk_usage(tmp_path)._replace(free=8 * 3 * 100 * 100 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    chosen = parts.split(source, test=2, validation=2, limit=None, where="x")
    with pytest.raises(DataError, match=r"lower data.side \(now 100\) or data.limit, images per class"):
        parts.write(tmp_path / "images.safetensors", source, chosen)
    assert source.rows == 0 and not (tmp_path / "images.safetensors").exists()


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((3, 4, 4, 4), np.uint8),
        np.zeros((3, 4, 4)),
        np.zeros((2, 4, 4), np.uint8),
        np.zeros((3, 16), np.uint8),
    ],
)
def test_decoded_images_of_another_kind_are_refused(images):
    with pytest.raises(DataError, match=r"data set test: images .* with labels \(3,\); expected uint8"):
        DecodedImages("test", images, np.zeros(3, np.uint8), classes=["a"])

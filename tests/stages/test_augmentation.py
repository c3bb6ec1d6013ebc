"""Augmentation of photographs and mixing of a batch's images, against references of numpy and of theory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.images import crop_and_flip, mix


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def windows(image: np.ndarray) -> set[bytes]:
    """Every cut-out of the reflected image, mirrored or not, from numpy's own padding."""
    side = image.shape[-1]
    most = side // 8
    padded = np.pad(image, ((0, 0), (most, most), (most, most)), mode="reflect")
    cuts = [
        padded[:, top : top + side, left : left + side]
        for top in range(2 * most + 1)
        for left in range(2 * most + 1)
    ]
    return {cut.tobytes() for cut in cuts} | {cut[:, :, ::-1].tobytes() for cut in cuts}


@pytest.mark.parametrize("side", [16, 21])
def test_photographs_are_cut_out_and_mirrored_in_every_way_and_no_other(side):
    images = torch.randn(2, 3, side, side, generator=generator())
    draws = generator(1)
    seen: tuple[set[bytes], set[bytes]] = (set(), set())
    for _ in range(600):
        for image, found in zip(crop_and_flip(images, draws).numpy(), seen, strict=True):
            found.add(image.tobytes())
    for image, found in zip(images.numpy(), seen, strict=True):
        assert found == windows(image) and len(found) == 2 * (2 * (side // 8) + 1) ** 2


def pair(n: int = 64, side: int = 12) -> tuple[Tensor, Tensor]:
    images = torch.rand(n, 3, side, side, generator=generator()) + 1
    return images, torch.eye(n)


def test_cutmix_puts_a_rectangle_of_the_neighbour_in():
    images, targets = pair()
    mixed, shares = mix(images, targets, generator(2), mixup=0.0, cutmix=1.0)
    neighbours = images.roll(1, 0)
    areas = []
    for n in range(len(images)):
        foreign = (mixed[n] == neighbours[n]).all(0)
        assert torch.equal(torch.where(foreign, neighbours[n], images[n]), mixed[n])
        rows, columns = foreign.any(1), foreign.any(0)
        assert torch.equal(foreign, rows[:, None] & columns[None, :])
        for edge in (rows.long(), columns.long()):
            assert int((edge.diff() == 1).sum()) <= 1 and int((edge.diff() == -1).sum()) <= 1
        areas.append(float(foreign.float().mean()))
        torch.testing.assert_close(shares[n, n], 1 - foreign.float().mean())
        torch.testing.assert_close(shares[n, n - 1], foreign.float().mean())
    assert len(set(areas)) > 10


def test_cutmix_s_rectangles_have_the_area_that_is_expected_and_lie_anywhere():
    images, targets = pair(n=3000)
    mixed, shares = mix(images, targets, generator(5), mixup=0.0, cutmix=1.0)
    # Sides L = sqrt(u), u uniform, centres uniform: an interval keeps L - L²/4 of itself inside [0, 1] on
    # average, both directions (L - L²/4)², and the integral over u is 1/2 - 1/5 + 1/48.
    assert abs(float(1 - shares.diagonal().mean()) - (1 / 2 - 1 / 5 + 1 / 48)) < 0.02
    foreign = (mixed == images.roll(1, 0)).all(1).float()
    foreign = foreign[foreign.any(1).any(1)]
    across, down = (
        (foreign.sum(side) * torch.arange(12)).sum(1) / foreign.sum((1, 2)) for side in (1, 2)
    )  # centres; height and width say nothing about where the rectangle lies
    assert abs(float(torch.corrcoef(torch.stack([across, down]))[0, 1])) < 0.1


def test_mixup_blends_pixels_and_targets_by_one_share_of_beta_s_variance():
    images, targets = pair(n=3000, side=8)
    for alpha in (0.2, 1.0):
        mixed, shares = mix(images, targets, generator(3), mixup=alpha, cutmix=0.0)
        share = shares.diagonal()
        kept = share.view(-1, 1, 1, 1)
        torch.testing.assert_close(mixed, kept * images + (1 - kept) * images.roll(1, 0))
        # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)); 3 000 draws tell both to a few per cent.
        assert abs(float(share.mean()) - 0.5) < 0.04
        assert abs(float(share.var()) * 4 * (2 * alpha + 1) - 1) < 0.1


def test_both_kinds_of_mixing_share_the_images():
    images, targets = pair(n=400)
    mixed, shares = mix(images, targets, generator(4), mixup=1.0, cutmix=1.0)
    own = (mixed == images) | (mixed == images.roll(1, 0))
    cut = own.flatten(1).all(1)
    assert 0.4 < float(cut.float().mean()) < 0.6
    torch.testing.assert_close(shares.sum(1), torch.ones(400))
    assert (shares >= 0).all()

"""Clusters: balanced k-means of a few vectors, and k-means of a stream's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from eugen import parallel
from eugen.ffn import TokenStream
from eugen.shapes import Float

ROUNDS = 20


def balanced_clusters(
    vectors: Float[Tensor, "n f"], clusters: int, capacity: int, *, generator: torch.Generator
) -> tuple[Tensor, Float[Tensor, "e f"]]:
    """Cluster of each vector, `[n]`, none with more than `capacity` members, and the clusters' means.

    k-means by inner products (for vectors of one length), in which the assignment keeps the capacity.

    Raises:
        ValueError: there is not enough room for all.
    """
    if clusters * capacity < len(vectors):
        raise ValueError(f"{clusters} clusters of {capacity} have no room for {len(vectors)} vectors")
    chosen = [int(torch.randint(len(vectors), (), generator=generator))]
    for _ in range(clusters - 1):  # k-means++: the farther from all starts so far, the likelier
        nearest = torch.cdist(vectors, vectors[chosen]).amin(1).square().cpu() + 1e-12
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
    centres = vectors[chosen]
    assigned = balanced_assignment(vectors @ centres.T, capacity)
    for _ in range(ROUNDS):
        member = torch.nn.functional.one_hot(assigned, clusters).to(vectors.dtype)
        centres = (member.T @ vectors) / member.sum(0).clamp(min=1)[:, None]
        # Nearest in Euclidean distance: of vectors of one length only the centre's own length counts.
        again = balanced_assignment(vectors @ centres.T - centres.square().sum(1) / 2, capacity)
        if torch.equal(again, assigned):
            break
        assigned = again
    return assigned, centres


def balanced_assignment(scores: Float[Tensor, "n e"], capacity: int) -> Tensor:
    """A column for each row, by falling scores, none taken by more than `capacity` rows.

    Rows ask for their best open column; an overfull one keeps those that would lose most elsewhere.
    """
    rows, columns = scores.shape
    assigned = torch.full((rows,), -1, device=scores.device)
    room = torch.full((columns,), capacity, device=scores.device)
    scores = scores.clone()
    while (free := (assigned < 0).nonzero().flatten()).numel():
        best = scores[free].topk(min(2, columns), dim=1)
        # Where one column is left, nobody can go elsewhere: infinite loss, any order.
        loss = best.values[:, 0] - best.values[:, -1]
        for column in best.indices[:, 0].unique():
            asking = (best.indices[:, 0] == column).nonzero().flatten()
            taken = asking[loss[asking].argsort(descending=True, stable=True)[: int(room[column])]]
            assigned[free[taken]] = column
            room[column] -= len(taken)
        scores[:, room == 0] = -torch.inf
    return assigned


def token_clusters(
    data: TokenStream, clusters: int, *, most: int, generator: torch.Generator
) -> Float[Tensor, "e d"]:
    """Centres of k-means (Lloyd, k-means++ start) on a stream's inputs, at most so many, evenly taken.

    Raises:
        ValueError: the stream is empty, holds NaN or infinity, or fewer tokens than clusters.
    """
    _, found = parallel.place(sum(len(x) for x, _, _ in data))
    if not found:
        raise ValueError("the calibration stream is empty: give at least one chunk of tokens")
    vectors = parallel.gathered(torch.cat([x[:: -(-found // most)] for x, _, _ in data]))
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    if not torch.isfinite(vectors).all():
        raise ValueError("the inputs hold NaN or infinity: check the calibration data")
    if len(vectors) < clusters:
        raise ValueError(f"{len(vectors)} tokens are too few for {clusters} clusters: give more calibration")
    chosen = [int(torch.randint(len(vectors), (), generator=generator))]
    nearest = torch.full((len(vectors),), torch.inf, device=vectors.device)
    for _ in range(clusters - 1):
        nearest = nearest.minimum((vectors - vectors[chosen[-1]]).square().sum(1))
        chosen.append(int(torch.multinomial(nearest.cpu() + 1e-12, 1, generator=generator)))
    centres = vectors[chosen]
    for _ in range(ROUNDS):
        member = torch.nn.functional.one_hot(nearest_centre(vectors, centres), clusters).to(vectors.dtype)
        size = member.sum(0)[:, None]
        centres = torch.where(size > 0, (member.T @ vectors) / size.clamp(min=1), centres)
    return centres


def nearest_centre(x: Float[Tensor, "t d"], centres: Float[Tensor, "e d"]) -> Tensor:
    """The nearest centre of each vector, `[t]`."""
    return (x.to(centres.dtype) @ centres.T - centres.square().sum(1) / 2).argmax(1)

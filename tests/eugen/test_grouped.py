"""Grouped products against masked dense ones in float64; balanced clusters; intercepts of groups."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from eugen.cost import UNCOUNTED_BY_TORCH
from eugen.least_squares import RIDGE
from eugen.parts.clusters import balanced_assignment, balanced_clusters
from eugen.parts.grouped import gathered_product, group, grouped_product, takes_groups
from eugen.parts.intercepts import ridge_with_intercepts
from tests.eugen.blocks import generator
from tests.tolerances import assert_close

EXPERTS = 6
SIZES = [(63, 60, 28), (63, 7, 5), (1, 60, 28), (0, 60, 28), (200, 64, 72)]


def grouped_linear(
    x: Float[Tensor, "t k"],
    expert: Tensor,
    weight: Float[Tensor, "e n k"],
    bias: Float[Tensor, "e n"] | None = None,
) -> Float[Tensor, "t n"]:
    """`y_t = weight[expert_t] x_t + bias[expert_t]`.

    Sorted groups where such a product exists (float32, float16, bfloat16 with row strides of whole
    16 bytes), else a copy of the weights for every row, which needs `t·n·k` numbers of memory.
    """
    if not takes_groups(x, weight):
        y = gathered_product(x, weight, expert)
    else:
        groups = group(expert, len(weight))
        sorted_y = grouped_product(x[groups.order], weight, groups)
        y = torch.empty_like(sorted_y).index_copy(0, groups.order, sorted_y)
    return y if bias is None else y + bias[expert]


def naive(x, expert, weight, bias=None):
    """Every expert on every row, then all but the row's own set to zero; float64."""
    x, weight = x.double(), weight.double()
    every = torch.einsum("tk,enk->ten", x, weight)
    every = every if bias is None else every + bias.double()
    return (every * F.one_hot(expert, len(weight)).unsqueeze(-1)).sum(1)


def case(rows, inner, outer, *, dtype=torch.float32, empty=()):
    seeded = generator(rows + inner)
    x = torch.randn(rows, inner, generator=seeded).to(dtype)
    weight = torch.randn(EXPERTS, outer, inner, generator=seeded).to(dtype)
    bias = torch.randn(EXPERTS, outer, generator=seeded).to(dtype)
    used = torch.tensor([e for e in range(EXPERTS) if e not in empty])
    expert = used[torch.randint(len(used), (rows,), generator=seeded)]
    return x, expert, weight, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_grouped_linear_is_the_masked_dense_product(size, dtype):
    x, expert, weight, bias = case(*size, dtype=dtype, empty=(0, 3, 5))
    assert_close(grouped_linear(x, expert, weight, bias), naive(x, expert, weight, bias).to(dtype))
    assert_close(grouped_linear(x, expert, weight), naive(x, expert, weight).to(dtype))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_are_those_of_the_masked_dense_product(size):
    tensors = case(*size, empty=(2,))
    expert = tensors[1]
    narrow = [t.requires_grad_() for t in (tensors[0], *tensors[2:])]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    # Both a varied gradient and that of a sum, which is one number expanded.
    for gradient_of in (lambda y: y.square().sum(), lambda y: y.sum()):
        ours = torch.autograd.grad(gradient_of(grouped_linear(narrow[0], expert, *narrow[1:])), narrow)
        theirs = torch.autograd.grad(gradient_of(naive(wide[0], expert, *wide[1:])), wide)
        for mine, exact in zip(ours, theirs, strict=True):
            assert_close(mine, exact, "gradient")


def counting() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=UNCOUNTED_BY_TORCH)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_counted_products_are_one_expert_a_row(size):
    x, expert, weight, bias = case(*size)
    for gradients in (True, False):
        with (
            torch.set_grad_enabled(gradients),
            counting() as counter,
        ):
            grouped_linear(x, expert, weight.requires_grad_(), bias)
        assert counter.get_total_flops() == 2 * len(x) * weight[0].numel()


def test_backward_counts_two_products_more():
    x, expert, weight, _ = case(63, 60, 28)
    with counting() as counter:
        grouped_linear(x.requires_grad_(), expert, weight.requires_grad_()).square().sum().backward()
    assert counter.get_total_flops() == 3 * 2 * len(x) * weight[0].numel()


def test_every_way_is_taken_by_some_size():
    taken = {takes_groups(x, weight) for x, _, weight, _ in (case(*size) for size in SIZES)}
    assert taken == {True, False}


def test_weights_may_be_a_view_with_odd_rows():
    x, expert, weight, _ = case(63, 60, 28)
    wide = torch.cat([weight.transpose(0, 1).flatten(1), torch.ones(28, 3)], dim=1)
    view = wide[:, : EXPERTS * 60].unflatten(1, (EXPERTS, 60)).transpose(0, 1)
    assert not view.is_contiguous()
    assert_close(grouped_linear(x, expert, view), naive(x, expert, weight).float())


@pytest.mark.parametrize("size", [(63, 60, 28), (63, 7, 5)], ids=str)
def test_compiled_with_gradients(size):
    x, expert, weight, bias = case(*size)
    torch.compiler.reset()
    compiled = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")
    weight.requires_grad_()
    assert_close(compiled(x, expert, weight, bias), grouped_linear(x, expert, weight, bias))
    ours = torch.autograd.grad(compiled(x, expert, weight, bias).square().sum(), weight)
    theirs = torch.autograd.grad(grouped_linear(x, expert, weight, bias).square().sum(), weight)
    assert_close(ours[0], theirs[0], "gradient")


def test_assignment_keeps_the_capacity_and_the_best_when_there_is_room():
    scores = torch.randn(50, 7, generator=generator())
    roomy = balanced_assignment(scores, 50)
    assert torch.equal(roomy, scores.argmax(1))
    tight = balanced_assignment(scores, 8)
    sizes = tight.bincount(minlength=7)
    assert sizes.max() <= 8
    assert sizes.sum() == 50
    assert tight.min() >= 0


def test_clusters_find_groups_that_are_there():
    centres = torch.eye(5, 20)
    truth = torch.arange(5).repeat(8)
    vectors = F.normalize(centres[truth] + 0.05 * torch.randn(40, 20, generator=generator()), dim=1)
    # One run may start twice in a group: the closest of a few is the truth.
    found, means = max(
        (balanced_clusters(vectors, 5, 8, generator=generator(seed)) for seed in range(5)),
        key=lambda result: float((vectors * result[1][result[0]]).sum()),
    )
    assert len(set(zip(truth.tolist(), found.tolist(), strict=True))) == 5
    for cluster in range(5):
        assert_close(means[cluster], vectors[found == cluster].mean(0))
    with pytest.raises(ValueError, match="no room for 40"):
        balanced_clusters(vectors, 4, 9, generator=generator())


def test_intercepts_are_found_and_not_shrunk():
    seeded = generator(3)
    features = torch.randn(400, 6, generator=seeded, dtype=torch.float64) + 2
    group = torch.randint(3, (400,), generator=seeded)
    weight = torch.randn(4, 6, generator=seeded, dtype=torch.float64)
    bias = 100 * torch.randn(4, 4, generator=seeded, dtype=torch.float64)
    target = features @ weight.T + bias[group]
    chunks = [
        (features[a : a + 100], target[a : a + 100], None, group[a : a + 100]) for a in range(0, 400, 100)
    ]
    found, intercepts = ridge_with_intercepts(lambda: chunks, 4)
    with torch.no_grad():
        error = (features @ found.T + intercepts[group] - target).square().sum(-1).mean()
        bound = RIDGE * (weight * features.std(0)).square().sum()
    assert error <= bound
    # A group without tokens answers with the mean target.
    assert_close(intercepts[3], target.mean(0))

"""Two real processes, each with a part of the tokens, against one that has all of them."""

from __future__ import annotations

import pytest
import torch
from torch import multiprocessing, nn

from eugen import (
    BlockShuffleConfig,
    DLRTConfig,
    EUGenConfig,
    EUGenExpertsConfig,
    FFFConfig,
    LowRankAwareConfig,
    MoEConfig,
    PruneConfig,
    PruneLinearConfig,
    SNNKConfig,
    parallel,
    replace,
)
from eugen.config import LayerConfig
from tests.eugen import ranks
from tests.eugen.blocks import block, tokens
from tests.tolerances import relative_rms

CONFIGS: dict[str, LayerConfig] = {
    "prune": PruneConfig(budget=0.4),
    "eugen": EUGenConfig(budget=0.5, projection="teacher"),
    "low_rank_aware": LowRankAwareConfig(budget=0.5),
    "dlrt": DLRTConfig(budget=0.5),
    "snnk": SNNKConfig(budget=0.6, features="urf"),
    "block_shuffle": BlockShuffleConfig(budget=0.5),
    "fff": FFFConfig(budget=0.5),
    "moe": MoEConfig(budget=0.5),
    "prune_linear": PruneLinearConfig(budget=0.5),
    "eugen_experts": EUGenExpertsConfig(budget=0.5, experts=4),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What both processes found."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    multiprocessing.start_processes(
        ranks.work, args=(folder, CONFIGS), nprocs=ranks.WORLD, start_method="spawn"
    )
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(ranks.WORLD)]


def test_operations(found):
    for each in (process["operations"] for process in found):
        assert each["total"].tolist() == [3, 30]
        assert each["numbers"] == [1, 0.5]
        assert each["gathered"].tolist() == [0, 1, 2, 10, 11]
        assert each["bools"].tolist() == [False, False, True, True, True]
        first, flag = each["first"]
        assert first[0] == torch.tensor(0.1) and torch.signbit(first[1]) and first[2].isnan() and flag
        assert torch.equal(each["drawn"], torch.randn(2, generator=torch.Generator().manual_seed(0)))
    assert [process["operations"]["place"] for process in found] == [(0, 5), (3, 5)]


def test_sums_are_those_of_one_process(found):
    alone = ranks.sums(ranks.chunks())
    for each in (process["moments"] for process in found):
        assert each["totals"][0] == alone["totals"][0] == 600
        for ours, theirs in zip(each["totals"][1:], alone["totals"][1:], strict=True):
            assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()
        for ours, theirs in zip(each["solution"], alone["solution"], strict=True):
            assert relative_rms(ours, theirs) < 1e-9
        assert each["r2"] == pytest.approx(alone["r2"], rel=1e-12)


@pytest.mark.parametrize("norm", ranks.NORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_those_of_one_process_and_equal_in_all(found, name, norm):
    first, second = (process[f"{name} {norm}"] for process in found)
    alone = ranks.fitted(norm, CONFIGS[name], None)
    assert first["r2"] == second["r2"] == pytest.approx(alone["r2"], abs=1e-4)
    for ours, theirs, single in zip(first["state"], second["state"], alone["state"], strict=True):
        for key, tensor in single.items():
            assert torch.equal(ours[key], theirs[key]), key
            assert ours[key].shape == tensor.shape
            if tensor.norm() > 0:
                assert relative_rms(ours[key], tensor) < 1e-5, key


def test_one_process_that_fails_ends_both(found):
    first, second = (process["errors"] for process in found)
    for case, own in (("NaN in one", "NaN or infinity"), ("nothing for one", "calibration data are empty")):
        assert own in second[case] and second[case].startswith(("ValueError", "SiteFault"))
        assert first[case].startswith("RuntimeError: another process failed")
    assert "other seeds" in first and "seed=1" in first["other seeds"]
    assert first["other seeds"] == second["other seeds"]
    assert first["pid"] != second["pid"]


@pytest.mark.parametrize(
    ("group", "message"),
    [("world", "init_process_group"), ("all", "must be 'world'"), (3, "group=3 must be")],
)
def test_what_is_no_group_is_refused(group, message):
    with pytest.raises(ValueError, match=message):
        replace(
            nn.Sequential(block(6, 24)), PruneConfig(budget=0.4), calibration=[tokens(40, 6)], group=group
        )


def test_an_end_of_the_group_is_an_end_of_its_sums():
    class Doubled:
        rank, size = 0, 1

        def sum(self, tensors):
            return [2 * tensor for tensor in tensors]

        def gather(self, tensor):
            return [tensor]

    def interrupted() -> None:
        with parallel.using(Doubled()):
            assert parallel.total_of(3) == [6]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert parallel.total_of(3) == [3]

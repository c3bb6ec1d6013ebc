"""Activations in bounded memory: what is spilled is the same, is bounded, and leaves nothing behind."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest
import torch

from eugen import EUGenConfig, FFFConfig, LowRankAwareConfig, MoEConfig, PruneConfig, replace
from eugen import activations as room
from eugen.activations import Activations, ActivationsWriter, Store
from eugen.config import LayerConfig
from eugen.least_squares import Moments
from eugen.parts.neurons import neuron_scores
from eugen.refine import LocalLoss
from tests.eugen.blocks import block, generator, tokens
from tests.eugen.models import bert, call_bert, images, sentences, vit
from tests.tolerances import relative_rms

SMALL = 64
"""Rows of a chunk in these tests, so that few tokens make several."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where temporary files go, with chunks small enough for files to be many."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(room, "ROWS", SMALL)
    return tmp_path


def spilling(monkeypatch) -> list[Path]:
    """Which files are written from here on."""
    written, write = [], Store._write

    def noting(self, tensor):
        written.append(write(self, tensor))
        return written[-1]

    monkeypatch.setattr(Store, "_write", noting)
    return written


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_file_gives_back_every_bit(folder, dtype):
    tensor = torch.randn(37, 5, generator=generator()).to(dtype)
    tensor[3, 2] = torch.nan
    with Store(0) as store:
        kept = store.keep(tensor[1:].T)
        assert kept.spilled and store.in_memory == 0
        assert len(kept) == 5
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        expected = tensor[1:].T.contiguous().view(bits)
        assert torch.equal(kept.read().view(bits), expected)
        rows = torch.tensor([4, 0, 4])
        assert torch.equal(kept.rows(rows).view(bits), expected[rows])


def test_memory_is_taken_up_to_the_limit_and_given_back(folder):
    tensor = torch.ones(10, 10)
    with Store(1000) as store:
        first, second, third = (
            store.keep(tensor, share=0.4),
            store.keep(tensor, share=0.4),
            store.keep(tensor),
        )
        assert [kept.spilled for kept in (first, second, third)] == [False, True, False]
        assert store.in_memory == 800
        (file,) = folder.glob("*/*")
        second.free()
        assert not file.exists()
        third.free()
        assert store.in_memory == 400
        assert not store.keep(tensor).spilled
    assert not list(folder.iterdir())


def test_a_view_does_not_keep_what_it_is_a_part_of():
    with Store(1000) as store:
        assert store.keep(torch.ones(1000)[:5]).read().untyped_storage().nbytes() == 20


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="memory_limit=-1 must be at least 0"):
        Store(-1)


def test_a_full_disk_is_an_error_that_says_what_to_do(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left.*memory_limit=0.*TMPDIR") as caught, Store(0) as store:
        store.keep(torch.ones(3))
    assert caught.value.errno == errno.ENOSPC
    assert not list(folder.iterdir())


@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [[1], [64], [10, 54, 0, 130, 7], [300], [0]])
def test_chunks_are_of_one_size_whatever_came_in(folder, limit, weighted, sizes):
    count = sum(sizes)
    x, y, weight = torch.randn(count, 3), torch.randn(count, 2), torch.rand(count)
    with Store(limit) as store:
        writer = ActivationsWriter(store)
        for parts in zip(x.split(sizes), y.split(sizes), weight.split(sizes), strict=True):
            writer.add(*parts[:2], parts[2] if weighted else None)
        data = writer.finish()
        assert [len(chunk[0]) for chunk in data] == (
            [SMALL] * (count // SMALL) + [count % SMALL] * (count % SMALL > 0) or [0]
        )
        for _ in range(2):  # read again and again
            again = [
                torch.cat(list(column)) if weighted or i < 2 else None
                for i, column in enumerate(zip(*data, strict=True))
            ]
            assert torch.equal(again[0], x) and torch.equal(again[1], y)
            assert torch.equal(again[2], weight) if weighted else again[2] is None
        rows = torch.randint(count, (50,)) if count else torch.zeros(0, dtype=torch.int64)
        found = data.gather(rows)
        assert torch.equal(found[0], x[rows]) and torch.equal(found[1], y[rows])
        assert torch.equal(found[2], weight[rows]) if weighted else found[2] is None
        data.free()
        assert store.in_memory == 0 and not list(folder.glob("*/*"))


def test_nothing_at_all_is_refused():
    with pytest.raises(ValueError, match="empty: give at least one"):
        ActivationsWriter(Store()).finish()


def test_a_batch_for_refinement_is_of_the_same_tokens_wherever_they_are(folder):
    x, y, weight = tokens(500, 12), tokens(500, 12, seed=2), torch.rand(500)
    values = []
    for limit in (0, 10**9):
        with Store(limit) as store:
            writer = ActivationsWriter(store)
            writer.add(x, y, weight)
            loss = LocalLoss(writer.finish(), generator=generator(3))
            values.append(torch.stack([loss(torch.sin, loss.draw()) for _ in range(3)]))
    plain = LocalLoss([(x, y, weight)], generator=generator(3))
    values.append(torch.stack([plain(torch.sin, plain.draw()) for _ in range(3)]))
    assert torch.equal(values[0], values[1])
    assert torch.allclose(values[1], values[2], rtol=1e-6)
    rows = torch.randint(500, (500,), generator=generator(3))
    spread = y.double().var(0, correction=0).sum()
    error = (
        (x[rows].sin() - y[rows]).double().square().sum(1) / spread * weight[rows] / weight.double().mean()
    )
    assert float(values[2][0]) == pytest.approx(float(error.mean()), rel=1e-5)


CONFIGS: dict[str, LayerConfig] = {
    "prune": PruneConfig(budget=0.4),
    "eugen": EUGenConfig(budget=0.5, projection="teacher"),
    "low_rank_aware": LowRankAwareConfig(budget=0.5),
    "fff": FFFConfig(budget=0.5),
    "moe": MoEConfig(budget=0.5),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_tiny_limit_changes_no_bit_of_any_layer(folder, monkeypatch, config):
    """Pre-norm without weights, post-norm with them; two runs within memory are bit-equal, too."""
    for model, call, batches in (
        (vit(depth=2), None, images(4)),
        (bert(layers=2), call_bert, sentences(4)),
    ):
        options = {"calibration": batches, "call": call, "refine_steps": 3}
        whole, again = (replace(model, config, **options) for _ in range(2))
        assert not list(folder.iterdir())
        written = spilling(monkeypatch)
        spilled = replace(model, config, **options, memory_limit=2000)
        assert len(written) > 8
        assert not list(folder.iterdir())
        for other in (again, spilled):
            assert [site.fit_r2 for site in other.sites] == [site.fit_r2 for site in whole.sites]
            for name, tensor in whole.model.state_dict().items():
                assert torch.equal(other.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["teacher", "student", "fit"])
def test_nothing_is_left_after_an_end_before_time(folder, monkeypatch, error, when):
    written, calls = spilling(monkeypatch), []

    def call(model, batch):
        calls.append(batch)
        if len(calls) == {"teacher": 3, "student": 6, "fit": 0}[when]:
            raise error
        return model(batch)

    def fit(*_, **__):
        raise error

    if when == "fit":
        monkeypatch.setattr(PruneConfig, "fit", fit)
    with pytest.raises((error, ValueError)) as raised:
        replace(vit(), PruneConfig(budget=0.4), calibration=images(4), call=call, memory_limit=0)
    assert error in (raised.type, type(raised.value.__cause__))
    assert written and not list(folder.iterdir())


def test_a_block_s_sums_are_given_back_once_it_is_fitted(folder, monkeypatch):
    """After every block fewer bytes are in use; at the end none."""
    used, stores, start = [], [], Store.__init__

    def noting(self, *args):
        start(self, *args)
        stores.append(self)

    monkeypatch.setattr(Store, "__init__", noting)
    options = {"calibration": images(4), "progress": lambda _: used.append(stores[0].in_memory)}
    replace(vit(depth=3), PruneConfig(budget=0.4), **options)
    assert used[0] == 2 * used[1] > 0
    assert used[2] == 0


def test_a_teacher_is_asked_only_for_the_blocks_that_are_left(folder, monkeypatch):
    model, finished, kept = vit(depth=3), {}, []
    options = {"calibration": images(4), "finished": finished}
    whole = replace(model, PruneConfig(budget=0.4), **options)
    del finished[whole.sites[2].name]
    keep = Store.keep
    monkeypatch.setattr(Store, "keep", lambda self, *a, **o: kept.append(a[0]) or keep(self, *a, **o))
    resumed = replace(model, PruneConfig(budget=0.4), **options)
    sums = [tensor for tensor in kept if len(tensor) == 12 * 5]
    assert len(sums) == 4
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_no_chunk_is_held_between_two_readings(folder):
    """A closed form reads a stream of files in the memory of one chunk."""
    with Store(0) as store:
        writer = ActivationsWriter(store)
        writer.add(torch.randn(10 * SMALL, 3), torch.randn(10 * SMALL, 2), None)
        mapped = [Path("/proc/self/maps").read_text().count(str(folder)) for _ in writer.finish()]
        assert len(mapped) == 10 and mapped[0] == 2
        assert max(mapped) <= 4  # this one, and the one before it until its name is given to this


@pytest.mark.parametrize("chunk", [7, 100, 999])
def test_cutting_the_stream_otherwise_changes_no_sum(chunk):
    dense, x = block(12, 48), tokens(1000, 12) + 3
    weight = torch.rand(1000, generator=generator())

    def solved(size: int):
        moments = Moments()
        for part, w in zip(x.split(size), weight.split(size), strict=True):
            moments.add(dense.features(part), part, w)
        return moments.solve()

    def scored(size: int):
        parts = zip(x.split(size), weight.split(size), strict=True)
        return neuron_scores(dense, [(part, part, w) for part, w in parts])

    with torch.no_grad():
        whole, cut = solved(1000), solved(chunk)
        prediction = [dense.features(x).double() @ w.T + b for w, b in (whole, cut)]
    error = [(p - x).square().mean() / x.double().var() for p in prediction]
    assert abs(error[1] - error[0]) < 1e-6
    assert relative_rms(prediction[1], prediction[0]) < 1e-5  # float32 products, amplified by a ridge of 1e-4
    assert relative_rms(scored(chunk), scored(1000)) < 1e-6


def test_scores_of_a_long_chunk_are_summed_part_by_part(monkeypatch):
    dense, x = block(12, 48), tokens(1000, 12)
    rows, features = [], type(dense).features
    monkeypatch.setattr("eugen.parts.neurons.ROWS_AT_ONCE", 300)
    monkeypatch.setattr(type(dense), "features", lambda self, x: rows.append(len(x)) or features(self, x))
    scores = neuron_scores(dense, [(x, x, None)])
    assert rows == [300, 300, 300, 100]
    hidden = features(dense, x).detach().double()
    energy = dense.down.weight.detach().double().square().sum(0)
    assert relative_rms(scores, hidden.var(0, correction=0) * energy) < 1e-9


def test_chunks_of_which_some_have_weights():
    x = torch.randn(4, 2)
    data = Activations.of([(x, x, None), (x, x, torch.full((4,), 3.0))])
    assert data.tokens == 8
    assert data[0][2].tolist() == [1] * 4 and data[1:][0][2].tolist() == [3] * 4

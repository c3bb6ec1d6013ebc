"""Every architecture that the library claims to know: found, exact, transferred, saved, exported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eugen import DenseConfig, LowRankAwareConfig, PruneConfig, find_ffns, register_site, replace
from eugen.config import UnsuitableBlock
from tests.eugen.architectures import ARCHITECTURES, Architecture
from tests.tolerances import assert_close, relative_rms

every_architecture = pytest.mark.parametrize("case", ARCHITECTURES.values(), ids=ARCHITECTURES)


@pytest.fixture(autouse=True)
def registered(request: pytest.FixtureRequest, adapters: None) -> None:
    case = request.node.callspec.params["case"]
    if case.adapter is not None:
        register_site(*case.adapter)


def cycled(values: object, index: int) -> object:
    return values[index % len(values)] if isinstance(values, tuple) else values


def flat(value: object) -> list[Tensor]:
    """The tensors of a module's inputs or outputs."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in flat(part)]
    return [tensor for part in value.values() for tensor in flat(part)] if isinstance(value, dict) else []


class Seen:
    """What every module was given first and gave first in one forward pass."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, case: Architecture) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        handles = [
            module.register_forward_hook(self._keep(name), with_kwargs=True)
            for name, module in model.named_modules()
        ]
        case.call(model, case.inputs(5))
        for handle in handles:
            handle.remove()

    def _keep(self, name: str):
        def hook(_module, args, kwargs, output):
            self.inputs[name] = [t.clone() for t in (*flat(args), *flat(kwargs))]
            self.outputs[name] = [t.clone() for t in flat(output)]

        return hook


@every_architecture
def test_blocks_are_found_and_are_the_model_s(case):
    model = case.build()
    sites, seen = find_ffns(model), Seen(model, case)
    assert len(sites) == case.blocks
    for index, site in enumerate(sites):
        parent, dense = site.name.rpartition(".")[0], site.dense
        prefix = f"{parent}." if parent else ""
        stream, norm = cycled(case.stream, index), case.norm
        assert site.stream == (None if stream is None else prefix + stream)
        assert site.norm == (None if norm is None else prefix + norm)
        assert (dense.in_features, dense.hidden_features, dense.out_features) == cycled(case.shapes, index)
        assert (dense.gate is not None) == case.gated
        x, y = seen.inputs[site.name][0], seen.outputs[site.output][0]
        assert_close(dense(x), y, site.name)


@every_architecture
def test_the_block_is_added_to_what_is_called_its_stream(case):
    model = case.build()
    seen = Seen(model, case)
    everything = [t for tensors in (*seen.inputs.values(), *seen.outputs.values()) for t in tensors]
    for site in find_ffns(model):
        y = seen.outputs[site.output][0]
        total = y
        if site.stream is not None:
            total = total + seen.inputs[site.stream][0]
        if case.beside is not None:
            total = total + seen.outputs[f"{site.name.rpartition('.')[0]}.{case.beside}"][0]
        alike = [t for t in everything if t.numel() == total.numel() and t.is_floating_point()]
        if site.stream is not None:
            assert any(relative_rms(t.reshape(total.shape), total) < 1e-5 for t in alike), site.name
        if site.norm is not None:
            assert_close(seen.inputs[site.norm][0].reshape(total.shape), total, site.norm)


def facts(model: nn.Module) -> list[tuple]:
    return [
        (s.name, s.output, s.stream, s.norm, s.bypass, s.dense.in_features, s.dense.hidden_features)
        for s in find_ffns(model)
    ]


@every_architecture
def test_finding_is_repeatable_touches_nothing_and_needs_no_weights(case):
    model = case.build()
    model.train()
    next(model.children()).eval()
    modes, state = [m.training for m in model.modules()], {k: v.clone() for k, v in tensors(model).items()}
    before = torch.get_rng_state()
    found = facts(model)
    assert found == facts(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[k], v) and v.grad is None for k, v in tensors(model).items())
    for dtype in (torch.bfloat16, torch.float16):
        assert facts(model.to(dtype)) == found
    assert facts(model.to("meta")) == found


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict((*model.named_parameters(), *model.named_buffers()))


@every_architecture
def test_the_dense_row_changes_nothing(case):
    model, batch = case.build(), case.inputs(5)
    result = replace(model, DenseConfig(), calibration=[batch], call=case.call)
    assert len(result.sites) == case.blocks and find_ffns(result.model) == []
    assert_close(case.call(result.model, batch), case.call(model, batch), "with gradients")
    with torch.no_grad():
        assert_close(case.call(result.model, batch), case.call(model, batch), "without gradients")
    ours, theirs = ({p.untyped_storage().data_ptr() for p in m.parameters()} for m in (result.model, model))
    assert not ours & theirs
    assert all(p.requires_grad for site in result.sites for p in site.layer.parameters())


@every_architecture
def test_blocks_that_are_left_stay_as_they_are_to_the_bit(case):
    model = case.build()
    sites = find_ffns(model)
    result = replace(model, PruneConfig(budget=0.5), where=lambda site: site.index == case.blocks - 1).model
    assert [site.name for site in find_ffns(result)] == [site.name for site in sites[:-1]]
    kept, replaced = tensors(result), sites[-1]
    changed = (replaced.name, *replaced.bypass, *(path for path, _ in replaced.settings))
    for name, tensor in tensors(model).items():
        if not name.startswith(changed):
            assert torch.equal(kept[name], tensor), name
    ours, theirs = Seen(result, case), Seen(model, case)
    for site in sites[:-1]:
        assert torch.equal(ours.outputs[site.output][0], theirs.outputs[site.output][0])


@every_architecture
@pytest.mark.parametrize("config", [PruneConfig(budget=0.8), LowRankAwareConfig(budget=0.8)], ids=type)
def test_a_transferred_row_is_nearer_than_an_untrained_one_and_is_saved(case, config, tmp_path):
    """Random weights have no small rank: at this budget low rank explains only a part of a block."""
    model, test = case.build(), case.inputs(9)
    calibration = [case.inputs(seed) for seed in range(10, 22)]
    if case.gated and isinstance(config, LowRankAwareConfig):
        with pytest.raises(UnsuitableBlock, match=rf"block {find_ffns(model)[0].name}: .* gated"):
            replace(model, config, calibration=calibration, call=case.call)
        return
    fitted = replace(model, config, calibration=calibration, call=case.call)
    fresh = replace(model, config, seed=1)
    assert all(site.fit_r2 is not None and site.fit_r2 > 0 for site in fitted.sites)
    with torch.no_grad():
        wanted, ours, untrained = (case.call(m, test) for m in (model, fitted.model, fresh.model))
        assert relative_rms(ours, wanted) < relative_rms(untrained, wanted)
        torch.save(fitted.model.state_dict(), tmp_path / "weights.pt")
        fresh.model.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        assert torch.equal(case.call(fresh.model, test), ours)


class Called(nn.Module):
    """A model behind its call, as one module to compile and to export."""

    def __init__(self, model: nn.Module, case: Architecture) -> None:
        super().__init__()
        self.model, self.call = model, case.call

    def forward(self, batch):
        return self.call(self.model, batch)


@pytest.mark.slow
@every_architecture
def test_what_was_replaced_compiles_and_exports(case):
    model, batch = case.build(), case.inputs(5)
    replaced = Called(replace(model, PruneConfig(budget=0.5)).model, case).eval()
    with torch.no_grad():
        wanted = replaced(batch)
        torch.compiler.reset()
        compiled = torch.compile(replaced, backend="eager", fullgraph=True)
        assert_close(compiled(batch), wanted, "compiled")
        exported = torch.export.export(replaced, (batch,), strict=False).module()
        assert_close(exported(batch), wanted, "exported")

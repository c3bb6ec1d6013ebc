"""What CONTRIBUTING.md shows must work as it stands."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import eugen
from eugen.config import LayerConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def squares(tmp_path, monkeypatch):
    """The example layer's module, registered for one test only."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (tmp_path / "squares.py").write_text(code)
    spec = importlib.util.spec_from_file_location("eugen.layers.squares", tmp_path / "squares.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.setattr(LayerConfig, "registry", dict(LayerConfig.registry))
    spec.loader.exec_module(module)
    return module


def dense_block():
    return eugen.DenseFFN(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 5))


def test_the_example_layer_registers_and_recovers_a_member_of_its_own_class(squares):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator)
    y = torch.cat([x, x.square()], -1) @ torch.randn(12, 5, generator=generator) + 1.5
    layer = eugen.layers()["squares"](budget=0.5).fit(dense_block(), [(x, y, None)], generator=generator)
    assert torch.linalg.norm(layer(x) - y) < 1e-3 * torch.linalg.norm(y)


def test_the_example_layer_counts_its_macs_and_keeps_its_budget(squares):
    dense = dense_block()
    layer = squares.SquaresConfig(budget=0.5).build(dense, generator=torch.Generator())
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(7, 6))
    assert counter.get_total_flops() == 2 * 7 * layer.macs_per_token
    assert layer.macs_per_token <= 0.5 * dense.macs_per_token
    with pytest.raises(ValueError, match="too small for 'squares'"):
        squares.SquaresConfig(budget=0.05).build(dense, generator=torch.Generator())


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/README.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target

"""The EUGens papers' synthetic study (arXiv 2410.09771, 2601.22563): approximations of layers `act(W x + b)`.

ReLU, Softplus and GELU on Gaussian inputs and on inputs with a power-law spectrum are six settings, each
a layer of its own in one model. Nothing is trained: the weights are drawn, `W_ij ~ N(0, 1/d)` and
`b_i ~ N(0, 1/4)`. The papers' text leaves the draws open; these are the project's choice. Inputs have
E‖x‖² = d in both distributions, so that pre-activations have one scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import eugen
from eugen.features import orthogonal_rows
from stages.params import Section, TaskSettings
from stages.tasks import DataSource, Log, Task

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "softplus": nn.Softplus, "gelu": nn.GELU}
INPUTS = ("gaussian", "power_law")
BIAS_DEVIATION = 0.5
CHUNK = 1024
"""Tokens of one batch."""
WEIGHTS, HELD_OUT, CALIBRATION = 10_000, 20_000, 30_000
"""Where each draw's seeds begin. Rows draw from the transfer's seed: from one stream, their random
features would be the dense layer's own weights."""


class DataSettings(Section):
    """Width of the layers, decay of the power-law spectrum, and how many inputs are held out."""

    width: PositiveInt
    decay: PositiveFloat = 1.0
    """Eigenvalue i of the power-law inputs' covariance is proportional to i^−decay."""
    validation: PositiveInt
    test: PositiveInt


class BaselineSettings(Section):
    """The layers' weights."""

    seed: int = 0


class KernelSettings(TaskSettings):
    """The task's section of params.yaml."""

    data: DataSettings
    baseline: BaselineSettings


class SingleLayer(nn.Module):
    """`act(W x + b)`: a feed-forward layer without an output matrix."""

    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__()
        # Not named as in any replacement: a stored student holds what the dense network has not, by name.
        self.affine, self.act = nn.Linear(width, width), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.affine(x))


def _parts(module: nn.Module) -> eugen.FFNParts:
    assert isinstance(module, SingleLayer)
    return eugen.FFNParts(dense=eugen.DenseFFN(module.affine, module.act), slot="", output="")


eugen.register_site(SingleLayer, _parts)


class Layers(nn.Module):
    """One layer per setting, none of which sees another: `[n, inputs, d]` to `[n, settings, d]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {f"{name}_{inputs}": SingleLayer(width, act()) for name, act, inputs in cases()}
        )

    def forward(self, x: Tensor) -> Tensor:
        columns = [INPUTS.index(inputs) for _, _, inputs in cases()]
        layers = self.layers.values()
        return torch.stack([layer(x[:, i]) for layer, i in zip(layers, columns, strict=True)], dim=1)


def cases() -> Iterator[tuple[str, type[nn.Module], str]]:
    """Name of the activation, its module and name of the inputs, per layer."""
    for name, act in ACTIVATIONS.items():
        for inputs in INPUTS:
            yield name, act, inputs


class Kernel(Task):
    """Squared error relative to the target's variance on held-out inputs, mean over the settings.

    `relative_mse.<activation>.<inputs>` are the settings' own.
    """

    name = "kernel"
    quality_name = "relative_mse"
    higher_is_better = False
    computed = True
    Settings: ClassVar[type[TaskSettings]] = KernelSettings
    settings: KernelSettings

    def prepare(self, folder: Path) -> dict[str, DataSource]:
        from stages.data import verify

        data = self.settings.data
        generator = torch.Generator().manual_seed(HELD_OUT)
        tensors = {"mixing": _mixing(data.width, data.decay, generator)}
        for part in ("test", "validation"):
            tensors[part] = _inputs(getattr(data, part), tensors["mixing"], generator)
        save_file(tensors, folder / "inputs.safetensors")
        sha256 = verify.sha256_arrays({name: tensor.numpy() for name, tensor in tensors.items()})
        return {"kernel_inputs": DataSource(sha256, data.test + data.validation)}

    @cached_property
    def _data(self) -> dict[str, Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    def build(self) -> nn.Module:
        return Layers(self.settings.data.width).to(self.device)

    @torch.no_grad()
    def _drawn(self) -> Layers:
        generator = torch.Generator().manual_seed(WEIGHTS + self.settings.baseline.seed)
        width = self.settings.data.width
        model = Layers(width)
        for layer in model.layers.values():
            assert isinstance(layer, SingleLayer)
            layer.affine.weight.copy_(torch.randn(width, width, generator=generator) / math.sqrt(width))
            layer.affine.bias.copy_(BIAS_DEVIATION * torch.randn(width, generator=generator))
        return model.to(self.device).eval()

    def train_dense(self, out: Path, checkpoint: Path, log: Log) -> nn.Module:
        for step, target in enumerate(self._targets("validation").unbind(1)):
            log("target_variance", float(target.var(0).mean()), step)
        return self._drawn()

    @cached_property
    def _teacher(self) -> Layers:
        return self._drawn()

    @torch.no_grad()
    def _targets(self, part: str) -> Tensor:
        """`act(W x + b)` in float64, `[n, settings, d]`: rounding of the dense network is an error too."""
        exact = Layers(self.settings.data.width).double()
        exact.load_state_dict({name: t.double().cpu() for name, t in self._teacher.state_dict().items()})
        return exact(self._data[part].double())

    @cached_property
    def _known(self) -> dict[str, Tensor]:
        return {part: self._targets(part) for part in ("validation", "test")}

    def call(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)

    def calibration(self, seed: int, tokens: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(CALIBRATION + seed)
        drawn = _inputs(tokens, self._data["mixing"], generator)
        return list(drawn.to(self.device).split(CHUNK))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        model.eval()
        target = self._known[part]
        chunks = self._data[part].to(self.device).split(CHUNK)
        errors = torch.cat([self.call(model, x).cpu().double() for x in chunks]) - target
        spread = target - target.mean(0)
        relative = errors.square().sum((0, 2)) / spread.square().sum((0, 2))
        names = [f"{self.quality_name}.{name}.{inputs}" for name, _, inputs in cases()]
        return {self.quality_name: float(relative.mean())} | dict(zip(names, relative.tolist(), strict=True))

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fresh inputs and the dense layers' outputs."""
        x = _inputs(batch_size, self._data["mixing"], generator).to(self.device)
        with torch.no_grad():
            return x, self.call(self._teacher, x)

    def batch_loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        x, target = batch
        return F.mse_loss(self.call(model, x), target)

    def example(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(HELD_OUT)
        return _inputs(batch, self._data["mixing"], generator).to(self.device)


def _mixing(width: int, decay: float, generator: torch.Generator) -> Tensor:
    """`M [d, d]`: standard normal z gives `z M` the spectrum i^−decay, trace d, in random directions.

    Turned out of the axes, because block-diagonal and Rademacher rows would notice these.
    """
    spectrum = torch.arange(1, width + 1, dtype=torch.float64).pow(-decay)
    spectrum *= width / spectrum.sum()
    directions = orthogonal_rows(width, width, generator=generator).double() / math.sqrt(width)
    return (spectrum.sqrt()[:, None] * directions).float().contiguous()


def _inputs(count: int, mixing: Tensor, generator: torch.Generator) -> Tensor:
    """`[count, inputs, d]`: Gaussian, and power-law."""
    z = torch.randn(2, count, len(mixing), generator=generator)
    return torch.stack([z[0], z[1] @ mixing], dim=1)

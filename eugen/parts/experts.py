"""Blocks of equally wide experts, of which every token uses a few.

y = Σ_{e chosen} W2[e] act(W1[e] x + b1[e]) + shared neurons + b2
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eugen.ffn import FFNLayer
from eugen.parts.grouped import (
    gathered_product,
    group,
    grouped_product,
    reads_are_free,
    takes_groups,
    takes_loop,
)
from eugen.shapes import Float

GATHERED_ROWS = 64
"""Up to so many rows have their weights copied out where no grouped product exists; more are masked."""


class ExpertFFN(FFNLayer):
    """Neurons in `experts` groups of `width`, then shared ones; each token uses `active` groups.

    `features` are all neurons with those of unused experts at zero, so that the readout is an ordinary
    linear map and its closed form an ordinary ridge regression. `forward` computes only what is used,
    in one of four ways, the fastest measured for the number of tokens (2 cores, AVX-512):

    - one token: its experts' weights are copied out, and are one narrow block (one expert: not copied);
    - more, in inference on the CPU with few experts: rows sorted by expert, a product for each of them;
    - more, with gradients, compiled or on a GPU: rows sorted by expert, one grouped product for each matrix;
    - where that does not exist (float64, widths that are no multiple of 16 bytes): weights copied out
      for every row up to `GATHERED_ROWS`, masked products beyond; an exported graph is masked as well.
    """

    readout: nn.Linear

    def __init__(
        self,
        up: nn.Linear,
        act: nn.Module,
        readout: nn.Linear,
        gate: nn.Linear | None,
        *,
        experts: int,
        width: int,
    ) -> None:
        super().__init__()
        self.up, self.act, self.readout, self.gate = up, act, readout, gate
        self.in_features, self.out_features = up.in_features, readout.out_features
        self.experts, self.width = experts, width
        self.routed = experts * width

    @property
    @abstractmethod
    def active(self) -> int:
        """How many experts each token uses."""

    @property
    @abstractmethod
    def routing_macs(self) -> int:
        """Multiply-accumulates of the choice for one token."""

    @abstractmethod
    def route(self, x: Float[Tensor, "t d_in"]) -> tuple[Tensor, Tensor | None]:
        """Chosen experts `[t, active]` and their factors.

        Factors are 1 and only carry the choice's gradient; None where no gradient is wanted.
        """

    @property
    def macs_per_token(self) -> int:
        per_neuron = self.in_features * (1 if self.gate is None else 2) + self.out_features
        neurons = self.active * self.width + self.up.out_features - self.routed
        return neurons * per_neuron + self.routing_macs

    def neurons(self, linear: Callable[[nn.Linear], Tensor]) -> Tensor:
        """The neurons, given how their linear maps are computed."""
        if self.gate is None:
            return self.act(linear(self.up))
        return self.act(linear(self.gate)) * linear(self.up)

    def shares(self, x: Float[Tensor, "t d_in"]) -> Float[Tensor, "t e"]:
        """Factor of every expert: 1 where chosen, else 0."""
        chosen, factor = self.route(x)
        factor = x.new_ones(chosen.shape) if factor is None else factor
        return x.new_zeros(x.shape[0], self.experts).scatter(1, chosen, factor)

    def weighted_neurons(
        self, x: Float[Tensor, "t d_in"], shares: Float[Tensor, "t e"]
    ) -> Float[Tensor, "t f"]:
        """All neurons times the shares of their experts; shared neurons as they are."""
        neurons = self.neurons(lambda linear: linear(x))
        routed = neurons[:, : self.routed].unflatten(1, (self.experts, self.width)) * shares.unsqueeze(-1)
        return torch.cat([routed.flatten(1), neurons[:, self.routed :]], dim=1)

    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch f"]:
        flat = x.reshape(-1, self.in_features)
        masked = self.weighted_neurons(flat, self.shares(flat))
        return masked.reshape(*x.shape[:-1], masked.shape[-1])

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if torch.compiler.is_exporting() or not self.sliceable():
            return self.reference(x)
        flat = x.reshape(-1, self.in_features)
        if flat.shape[0] == 1:
            way = self._one
        elif takes_loop(flat, self._input_groups(self.up)) or takes_groups(flat, self._input_groups(self.up)):
            way = self._grouped
        elif flat.shape[0] * self.active <= GATHERED_ROWS:
            way = self._gathered
        else:
            return self.reference(x)
        chosen, factor = self.route(flat)
        y = self.finish(way(flat, chosen, factor), flat, chosen, factor)
        return y.reshape(*x.shape[:-1], self.out_features)

    def finish(
        self, y: Float[Tensor, "t d_out"], x: Float[Tensor, "t d_in"], chosen: Tensor, factor: Tensor | None
    ) -> Float[Tensor, "t d_out"]:
        """Add the shared neurons and the bias to what the experts give."""
        if self.up.out_features > self.routed:
            shared = self.neurons(lambda linear: part(linear, x, self.routed, linear.out_features))
            y = torch.addmm(y, shared, self.readout.weight[:, self.routed :].T)
        return y if self.readout.bias is None else y + self.readout.bias

    def sliceable(self) -> bool:
        """Whether the matrices can be cut into groups: a layer of another precision has none to cut."""
        return all(type(m) is nn.Linear for m in (self.up, self.readout, self.gate or self.up))

    def _input_groups(self, linear: nn.Linear) -> Float[Tensor, "e w d_in"]:
        return linear.weight[: self.routed].view(self.experts, self.width, self.in_features)

    def _output_groups(self) -> Float[Tensor, "d_out e w"]:
        return self.readout.weight[:, : self.routed].unflatten(1, (self.experts, self.width))

    def _bias_groups(self, linear: nn.Linear) -> Float[Tensor, "e w"] | None:
        return None if linear.bias is None else linear.bias[: self.routed].view(self.experts, self.width)

    def _grouped(
        self, x: Float[Tensor, "t d_in"], chosen: Tensor, factor: Tensor | None
    ) -> Float[Tensor, "t d_out"]:
        groups = group(chosen.reshape(-1), self.experts, read=takes_loop(x, self._input_groups(self.up)))
        token = groups.order // self.active if self.active > 1 else groups.order
        rows = x.index_select(0, token)
        neurons = self.neurons(
            lambda linear: grouped_product(
                rows, self._input_groups(linear), groups, self._bias_groups(linear)
            )
        )
        if factor is not None:
            neurons = neurons * factor.reshape(-1, 1)[groups.order]
        y = grouped_product(neurons, self._output_groups().transpose(0, 1), groups)
        return y.new_zeros(x.shape[0], self.out_features).index_add_(0, token, y)

    def _gathered(
        self, x: Float[Tensor, "t d_in"], chosen: Tensor, factor: Tensor | None
    ) -> Float[Tensor, "t d_out"]:
        expert, rows = chosen.reshape(-1), x.repeat_interleave(self.active, 0)

        def linear(module: nn.Linear) -> Tensor:
            z, bias = gathered_product(rows, self._input_groups(module), expert), self._bias_groups(module)
            return z if bias is None else z + bias[expert]

        neurons = self.neurons(linear)
        if factor is not None:
            neurons = neurons * factor.reshape(-1, 1)
        y = gathered_product(neurons, self._output_groups().transpose(0, 1), expert)
        return y.view(x.shape[0], self.active, self.out_features).sum(1)

    def _one(
        self, x: Float[Tensor, "1 d_in"], chosen: Tensor, factor: Tensor | None
    ) -> Float[Tensor, "1 d_out"]:
        """One token's experts, side by side, are one narrow block; a single one is a slice of the weights."""
        if self.active == 1 and reads_are_free(x):
            start = int(chosen) * self.width
            neurons = self.neurons(lambda module: part(module, x, start, start + self.width))
            weight = self.readout.weight[:, start : start + self.width]
        else:
            neurons = self.neurons(lambda module: self._selected(module, x, chosen[0]))
            weight = self._selected_outputs(chosen[0])
        if factor is not None:
            neurons = neurons * factor.repeat_interleave(self.width, dim=1)
        return F.linear(neurons, weight)

    def _selected(self, linear: nn.Linear, x: Tensor, chosen: Tensor) -> Tensor:
        weight, bias = self._input_groups(linear).index_select(0, chosen), self._bias_groups(linear)
        own_bias = None if bias is None else bias.index_select(0, chosen).flatten()
        return F.linear(x, weight.flatten(0, 1), own_bias)

    def _selected_outputs(self, chosen: Tensor) -> Float[Tensor, "d_out w"]:
        if self.up.out_features % self.width:
            return self._output_groups()[:, chosen].flatten(1)
        # Shared neurons are whole groups too: of a slice, `index_select` would copy everything first.
        groups = self.readout.weight.unflatten(1, (-1, self.width))
        return groups.index_select(1, chosen).flatten(1)


def part(linear: nn.Linear, x: Tensor, start: int, end: int) -> Tensor:
    """The rows `start`…`end` of a linear map."""
    return F.linear(x, linear.weight[start:end], None if linear.bias is None else linear.bias[start:end])


@torch.no_grad()
def copy_rows(target: nn.Linear, source: nn.Linear, rows: Tensor) -> None:
    """Copy the rows of a linear map, with their biases; a row of −1 becomes a neuron of zeros."""
    there = (rows >= 0).to(source.weight.dtype)
    target.weight.copy_(source.weight[rows] * there[:, None])
    target.bias.copy_(torch.zeros_like(target.bias) if source.bias is None else source.bias[rows] * there)

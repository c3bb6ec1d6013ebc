"""`replace`: the model with cheaper feed-forward blocks; `map_layers`: these blocks in another form."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from eugen import parallel
from eugen.activations import MEMORY_LIMIT, Store
from eugen.config import LayerConfig
from eugen.ffn import FFNLayer
from eugen.sites import FFNSite, find_ffns
from eugen.sites.faults import check_weights, nothing_found
from eugen.transfer import Transfer, default_call

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ReplacedSite:
    """One replaced block.

    Attributes:
        name: path of the new layer in the model.
        macs_ratio, params_ratio: the layer's inference MACs and stored weights over the dense block's.
        fit_r2: R² on held-out calibration tokens against the transfer's target, in the metric of the
            norm that follows; None for an untrained layer or one that needs no calibration. With refinement
            the same tokens chose between the closed form and the refined layer.
    """

    name: str
    index: int
    layer: FFNLayer
    macs_ratio: float
    params_ratio: float
    fit_r2: float | None


@dataclass(frozen=True)
class Replacement:
    """A new model and what was replaced in it. The model given to `replace` is left as it was."""

    model: nn.Module
    sites: list[ReplacedSite]


@dataclass(frozen=True)
class FittedBlock:
    """What is worth keeping of a fitted block: its tensors by their names in the layer, and its `fit_r2`."""

    state: dict[str, Tensor]
    fit_r2: float | None


def replace(
    model: nn.Module,
    config: LayerConfig | Mapping[str, LayerConfig],
    *,
    calibration: Iterable[Any] | None = None,
    where: Callable[[FFNSite], bool] | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
    refine_steps: int = 0,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    finished: MutableMapping[str, FittedBlock] | None = None,
    memory_limit: int = MEMORY_LIMIT,
    group: parallel.Group | ProcessGroup | Literal["world"] | None = None,
) -> Replacement:
    """A copy of the model whose feed-forward blocks are what `config` describes.

    With calibration data the blocks are fitted one after the other, front to back, each on the
    activations of the already replaced network and against the dense network's residual stream;
    no gradient of the network is used.

    Args:
        config: one for all blocks, or one for each block by its name; blocks not named stay dense.
        calibration: re-iterable batches of model inputs (a list, a DataLoader); None builds untrained layers.
        where: which blocks; all by default.
        call: how a batch goes into the model; `model(batch)` by default.
        refine_steps: Adam steps on each layer alone, after its closed form; 0 for none.
        seed: for random projections, initialisation and refinement; global seeds are not touched. A block's
            draws depend on the seed and the block alone.
        progress: called with one line after each fitted block.
        finished: what an interrupted call with the same arguments fitted, by the block's name, and what is
            taken as it is; each block is put there as soon as it is fitted.
        memory_limit: bytes of activations kept in memory, 2 GiB by default; what is beyond goes to files in a
            temporary folder. The models, one batch and the fit of one block come on top.
        group: processes that fit together, each called with its own part of the calibration data and the
            same model and settings: a process group, or "world" for all of torch.distributed. All get the
            same layers.

    Raises:
        ValueError: no block was found or selected, a name is no block's, weights are quantised or not
            loaded, the budget is too small for one, or the calibration data are empty, not re-iterable,
            hold NaN or do not go through the model (what the model or `call` raised is the error's cause).
        RuntimeError: another process of the group failed.

    Warns:
        UserWarning: a block was fitted on fewer than two tokens a feature; says how many are enough.
    """
    together = parallel.resolve(group)
    sites, configs = _configured(model, config, where)
    check_weights(model, sites, fitted=calibration is not None, refined=refine_steps > 0)
    # Sizes are checked on all blocks before any work: building on the meta device costs nothing.
    for site in sites:
        _check_size(configs[site.name], site)
    student, done, replaced = copy.deepcopy(model), {} if finished is None else finished, []
    left = {site.name: configs[site.name] for site in sites if site.name not in done}
    parallel.require_equal(together, "blocks, configurations or settings", f"{left} {refine_steps=} {seed=}")
    with Store(memory_limit) as store:
        transfer = None
        if calibration is not None:
            wanted = [s for s in sites if s.name in left and configs[s.name].needs_calibration]
            options = {"wanted": wanted, "store": store, "group": together, "progress": progress}
            transfer = Transfer(model, sites, calibration, call or default_call, **options)
        for site in sites:
            config, generator = configs[site.name], block_generator(seed, site)
            if site.name in done or transfer is None:
                layer, r2 = _built(config, site, generator, done.get(site.name))
            else:
                layer, r2 = transfer.fit(student, site, config, refine_steps, generator)
                done[site.name] = FittedBlock(layer.state_dict(), r2)
            student = install(student, site, layer)
            replaced.append(_replaced(site, layer, r2))
    if transfer is not None:
        transfer.warn_of_few_tokens()
    return Replacement(student, replaced)


def map_layers(model: nn.Module, change: Callable[[FFNLayer], FFNLayer]) -> nn.Module:
    """A copy of the model in which every layer of `replace` is what `change` makes of it.

    `map_layers(model, lambda layer: layer.merged())` is the form to deploy; with `Int8Config().wrap`
    every block is quantised, after transfer and fine-tuning. A layer inside another one stays as it is.

    Raises:
        ValueError: what `change` refuses, with the block's name.
    """
    changed = copy.deepcopy(model)
    made: dict[FFNLayer, FFNLayer] = {}
    done: list[str] = []
    for name, layer in list(changed.named_modules(remove_duplicate=False)):
        if not isinstance(layer, FFNLayer) or name.startswith(tuple(done)):
            continue
        if layer not in made:  # a layer that stands in two places stays one
            with _naming(name):
                made[layer] = change(layer).train(layer.training)
        changed = put(changed, name, made[layer])
        done.append(f"{name}." if name else "")
    return changed


def install(model: nn.Module, site: FFNSite, layer: FFNLayer) -> nn.Module:
    """Put a layer into the site's place; returns the model, or the layer if the site is the whole model."""
    layer.train(model.training)
    for path in site.bypass:
        put(model, path, nn.Identity())
    for path, value in site.settings:
        put(model, path, value)
    return put(model, site.name, layer)


def put(model: nn.Module, path: str, module: Any) -> nn.Module:
    """Set what is at this path; returns the model, or the module if the path is "", the whole model."""
    parent, _, name = path.rpartition(".")
    if name == "":
        return module
    setattr(model.get_submodule(parent), name, module)
    return model


def _configured(
    model: nn.Module,
    config: LayerConfig | Mapping[str, LayerConfig],
    where: Callable[[FFNSite], bool] | None,
) -> tuple[list[FFNSite], Mapping[str, LayerConfig]]:
    sites = blocks_of(model, where)
    if isinstance(config, Mapping):
        return _named(sites, config), config
    return sites, {site.name: config for site in sites}


def blocks_of(model: nn.Module, where: Callable[[FFNSite], bool] | None = None) -> list[FFNSite]:
    """The model's blocks, or those that `where` selects.

    Raises:
        ValueError: there is none.
    """
    found = find_ffns(model)
    if not found:
        raise ValueError(nothing_found(model))
    sites = [site for site in found if where is None or where(site)]
    if not sites:
        raise ValueError(
            f"where= selected none of the {len(found)} blocks: {', '.join(s.name for s in found)}"
        )
    return sites


def _named(sites: list[FFNSite], configs: Mapping[str, LayerConfig]) -> list[FFNSite]:
    """The blocks that have a configuration.

    Raises:
        ValueError: a name is none of theirs, or there is no name at all.
    """
    names = [site.name for site in sites]
    unknown = [name for name in configs if name not in names]
    if unknown or not configs:
        said = f"block {unknown[0]!r} is none of this model's" if unknown else "no block has a configuration"
        raise ValueError(f"{said}; its blocks are {', '.join(names)}")
    return [site for site in sites if site.name in configs]


def block_generator(seed: int, site: FFNSite) -> torch.Generator:
    """A block's own draws: the same whatever was drawn for the blocks before it."""
    seeds = torch.randint(2**62, (site.index + 1,), generator=torch.Generator().manual_seed(seed))
    return torch.Generator().manual_seed(int(seeds[-1]))


def _built(
    config: LayerConfig, site: FFNSite, generator: torch.Generator, kept: FittedBlock | None
) -> tuple[FFNLayer, float | None]:
    """An untrained layer, or the one that was fitted before."""
    layer = config.build(site.dense, generator=generator)
    if kept is None:
        return layer, None
    layer.load_state_dict(kept.state)
    return layer, kept.fit_r2


def _check_size(config: LayerConfig, site: FFNSite) -> None:
    with _naming(site.name):
        config.build(copy.deepcopy(site.dense).to("meta"), generator=torch.Generator())


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Say in a ValueError which block it is of."""
    try:
        yield
    except ValueError as error:
        error.args = (f"block {path or '(the model itself)'}: {error}",)
        raise


def _replaced(site: FFNSite, layer: FFNLayer, r2: float | None) -> ReplacedSite:
    return ReplacedSite(
        name=site.name,
        index=site.index,
        layer=layer,
        macs_ratio=layer.macs_per_token / site.dense.macs_per_token,
        params_ratio=layer.num_parameters() / site.dense.num_parameters(),
        fit_r2=r2,
    )

"""Why a model cannot be taken as it is, in words: which block, and the cure."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from eugen.ffn import FFNLayer
from eugen.sites import FFNSite

KNOWN = (
    "timm's MLPs, transformers' MLPs and BERT-like pairs, torch's transformer layers and nn.Sequential chains"
)

_PLAIN_FIRST = (
    "replace the blocks of the floating-point model, then quantise (eugen.map_layers with Int8Config().wrap)"
)


ENOUGH_TOKENS_PER_FEATURE = 25


class SiteFault(ValueError):
    """A block that cannot be watched while the model runs; what it says is complete."""


def nothing_found(model: nn.Module) -> str:
    """Why `find_ffns` found no block in this model."""
    name = type(model).__name__
    layers = [path for path, module in model.named_modules() if isinstance(module, FFNLayer)]
    if layers:
        return (
            f"no feed-forward block is left in {name}, {_count(layers)} replaced already: start from the "
            "dense model, or change the layers with eugen.map_layers"
        )
    quantised = [path for path, module in model.named_modules() if _quantised(module)]
    if quantised:
        return f"no feed-forward block found in {name}, and {_count(quantised)} quantised: {_PLAIN_FIRST}"
    return (
        f"no feed-forward block found in {name}: eugen knows {KNOWN}; "
        "teach it your module with eugen.register_site(ModuleType, adapter)"
    )


def check_weights(model: nn.Module, sites: list[FFNSite], *, fitted: bool, refined: bool) -> None:
    """Refuse weights that cannot be worked with, before any work.

    Args:
        fitted: with calibration data, so that the model has to run.
        refined: by steps of gradient descent, too.

    Raises:
        ValueError: a block's weights are quantised or of several dtypes, or a linear map of it computes in a
            way of its own; on the meta device where the model has to run; float16 where its layer is to be
            refined, or where its outputs are too small for it.
    """
    for site in sites:
        _check_plain(site)
        dtypes = {w.dtype for w in site.dense.parameters()}
        if len(dtypes) > 1:
            raise ValueError(
                f"block {_named(site.name)} mixes {' and '.join(_words(dtypes))}: convert the model to one, "
                "model.float() or model.bfloat16()"
            )
        if torch.float16 in dtypes:
            _check_half(site, refined=refined)
    if fitted:
        _check_loaded(model, sites)


def _check_plain(site: FFNSite) -> None:
    weights = list(site.dense.parameters())
    if any(not w.is_floating_point() or _is_wrapped(w) for w in weights):
        dtypes = ", ".join(_words({w.dtype for w in weights}))
        raise ValueError(f"block {_named(site.name)} is quantised ({dtypes}): {_PLAIN_FIRST}")
    for linear in site.dense.modules():
        if isinstance(linear, nn.Linear) and type(linear).forward is not nn.Linear.forward:
            kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
            raise ValueError(
                f"block {_named(site.name)} holds a {kind}, which computes more than its weights say "
                f"(quantised, or with an adapter to merge first): {_PLAIN_FIRST}"
            )


def _check_half(site: FFNSite, *, refined: bool) -> None:
    if refined:
        raise ValueError(
            f"block {_named(site.name)} is float16, too narrow a range for refine_steps: convert the "
            "model and its inputs to float32 (model.float()) or bfloat16, and the result back (.half())"
        )
    if site.dense.down is None or site.dense.down.weight.is_meta:
        return
    size = float(site.dense.down.weight.detach().float().square().mean().sqrt())
    if 0 < size < torch.finfo(torch.float16).tiny:
        raise ValueError(
            f"block {_named(site.name)} is float16 and its output weights, a layer scale included, have RMS "
            f"{size:.1e}, below that format's range: convert the model to float32 (model.float()) or bfloat16"
        )


def shared_block(model: nn.Module, site: FFNSite) -> str:
    """That a block ran twice in one forward pass."""
    block = model.get_submodule(site.name)
    places = [name for name, module in model.named_modules(remove_duplicate=False) if module is block]
    where = f" (it stands at {' and at '.join(places)})" if len(places) > 1 else ""
    return (
        f"block {_named(site.name)} ran twice in one forward pass{where}: shared blocks cannot be "
        "transferred; give each place a block of its own (copy.deepcopy), leave this one out with where=, or "
        "build it without calibration and train"
    )


def did_not_run(site: FFNSite) -> str:
    """That a block was not reached by any calibration batch, or not by all."""
    return f"block {_named(site.name)} did not run when the model was called with the calibration data"


def called_by_keyword(site: FFNSite) -> str:
    """That a block's module was called with keywords only."""
    return (
        f"block {_named(site.name)} or the module that its residual stream enters is called with keywords "
        "only, and layers take their input by position: change the call in the model's code"
    )


def too_few_tokens(short: list[tuple[FFNSite, int, int]], *, of: int) -> str:
    """That blocks were fitted on too few tokens, and how many are enough.

    Args:
        short: these blocks, the tokens each was fitted on and its features.
        of: how many blocks were fitted.
    """
    site, tokens, features = max(short, key=lambda entry: entry[2])
    return (
        f"too few calibration tokens for {len(short)} of {of} blocks: block {_named(site.name)} was fitted "
        f"on {tokens} for {features} features, and so with a strong ridge; give at least "
        f"{ENOUGH_TOKENS_PER_FEATURE * features} ({ENOUGH_TOKENS_PER_FEATURE} a feature), or a smaller budget"
    )


def batch_failed(
    error: Exception, *, model: str, number: int, batch: object, sites: list[FFNSite], reached: set[str]
) -> str:
    """That a calibration batch does not go through a model, and how far it came.

    Args:
        model: which one, in words.
        number: of the batch, from 1.
        reached: names of the blocks whose input was seen.
    """
    done = [site for site in sites if site.name in reached]
    place = f"in or behind block {_named(done[-1].name)}" if done else f"before block {_named(sites[0].name)}"
    return (
        f"calibration batch {number} ({described(batch)}) does not go through {model}: "
        f"{type(error).__name__} {place}: {error}; give batches that model(batch) takes, or say with call= "
        "how one goes in"
    )


def described(batch: object, depth: int = 2) -> str:
    """What a batch is, in a few words: tensors by shape and dtype, containers by what they hold."""
    if isinstance(batch, Tensor):
        device = "" if batch.device.type == "cpu" else f" on {batch.device}"
        return f"Tensor {list(batch.shape)} {str(batch.dtype).removeprefix('torch.')}{device}"
    kind = type(batch).__name__
    if depth and isinstance(batch, Mapping):
        return f"{kind} with " + _listed([f"{k}: {described(v, depth - 1)}" for k, v in batch.items()])
    if depth and isinstance(batch, (list, tuple)):
        return f"{kind} of " + _listed([described(part, depth - 1) for part in batch])
    return kind


def _listed(words: list[str], most: int = 4) -> str:
    return ", ".join([*words[:most], *(["…"] if len(words) > most else [])]) or "nothing"


def _check_loaded(model: nn.Module, sites: list[FFNSite]) -> None:
    for site in sites:
        if any(w.is_meta for w in site.dense.parameters()):
            raise ValueError(f"block {_named(site.name)} {_EMPTY}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"the model's {name} {_EMPTY}")


_EMPTY = (
    "is on the meta device and holds no weights, so it cannot be fitted: load them first "
    "(model.to_empty(device=...) and load_state_dict, or without offloading), or leave calibration out"
)


def _quantised(module: nn.Module) -> bool:
    if ".quantized." in f"{type(module).__module__}.":
        return isinstance(getattr(module, "in_features", None), int)
    return isinstance(module, nn.Linear) and (
        not module.weight.is_floating_point() or _is_wrapped(module.weight)
    )


def _is_wrapped(weight: Tensor) -> bool:
    """Whether the values are another tensor class's, as torchao's, which calls itself float32."""
    return type(weight.detach()).__module__.split(".")[0] == "torchao"


def _words(dtypes: set[torch.dtype]) -> list[str]:
    return sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _count(paths: list[str]) -> str:
    first = _named(paths[0])
    return f"{first} is" if len(paths) == 1 else f"{len(paths)} modules ({first}, …) are"


def _named(path: str) -> str:
    return path or "(the model itself)"

"""Why a model cannot be taken as it is, in words: which block, and the cure."""

from __future__ import annotations

from torch import Tensor, nn

from eugen.ffn import FFNLayer
from eugen.sites import FFNSite

KNOWN = (
    "timm's MLPs, transformers' MLPs and BERT-like pairs, torch's transformer layers and nn.Sequential chains"
)


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
        return (
            f"no feed-forward block found in {name}, and {_count(quantised)} quantised: replace the blocks "
            "of the floating-point model, then quantise (eugen.map_layers with Int8Config().wrap)"
        )
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
        ValueError: a block's weights are quantised, or of several dtypes; on the meta device where the model
            has to run; float16 where its layer is to be refined.
    """
    for site in sites:
        weights = list(site.dense.parameters())
        dtypes = sorted({str(w.dtype).removeprefix("torch.") for w in weights})
        if any(not w.is_floating_point() or _is_wrapped(w) for w in weights):
            raise ValueError(
                f"block {_named(site.name)} is quantised ({', '.join(dtypes)}): replace the blocks of the "
                "floating-point model, then quantise (eugen.map_layers with Int8Config().wrap)"
            )
        if len(dtypes) > 1:
            raise ValueError(
                f"block {_named(site.name)} mixes {' and '.join(dtypes)}: convert the model to one, "
                "model.float() or model.bfloat16()"
            )
        if refined and "float16" in dtypes:
            raise ValueError(
                f"block {_named(site.name)} is float16, too narrow a range for refine_steps: convert the "
                "model and its inputs to float32 (model.float()) or bfloat16, and the result back (.half())"
            )
    if fitted:
        _check_loaded(model, sites)


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


def _count(paths: list[str]) -> str:
    first = _named(paths[0])
    return f"{first} is" if len(paths) == 1 else f"{len(paths)} modules ({first}, …) are"


def _named(path: str) -> str:
    return path or "(the model itself)"

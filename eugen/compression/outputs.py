"""What a model gives, and how well another one gives the same: quality that needs no labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eugen.capture import evaluating

MAIN = {"language": "kl", "classes": "top1_agreement", "features": "cosine"}
"""The figure that speaks for each kind of output; of features per token their pooled cosine."""
LOWER_IS_BETTER = ("kl", "relative_error", "perplexity")


def main_output(model: nn.Module, result: Any) -> tuple[Tensor, str]:
    """The tensor of a result that counts, and its kind.

    `language`: logits over a vocabulary; `classes`: logits of classes; `features`: anything else. A kind is
    what the model says of itself (`config.vocab_size`, `.logits`, `num_classes`).

    Raises:
        ValueError: there is no tensor of floating point.
    """
    logits = getattr(result, "logits", None)
    if isinstance(logits, Tensor):
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        return logits, "language" if logits.ndim > 2 and logits.shape[-1] == vocabulary else "classes"
    hidden = getattr(result, "last_hidden_state", None)
    found = hidden if isinstance(hidden, Tensor) else _first_tensor(result)
    if found is None:
        raise ValueError(f"the model gives {type(result).__name__} without a tensor of floating point")
    classes = found.ndim == 2 and getattr(model, "num_classes", None) == found.shape[-1]
    return found, "classes" if classes else "features"


def _first_tensor(result: Any) -> Tensor | None:
    if isinstance(result, Tensor):
        return result if result.is_floating_point() else None
    parts = result.values() if isinstance(result, Mapping) else result
    if not isinstance(parts, Iterable):
        return None
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


@torch.no_grad()
def agreement(
    dense: nn.Module, other: nn.Module, batches: Iterable[Any], *, call: Callable[[nn.Module, Any], Any]
) -> dict[str, float | str]:
    """How near another model's outputs are to the dense one's, over batches that neither was fitted to.

    Always `cosine` (mean over output vectors) and `relative_error` (Frobenius norm of the difference over the
    dense outputs'). Features per token: `pooled_cosine`, of the means over tokens. Classes and vocabularies:
    `top1_agreement`. Vocabularies: `kl`, from dense to other in nats a token; of a causal model also both
    perplexities on the data. `kind` and `main` say what is what, `examples` over how many.

    Raises:
        ValueError: no batch, outputs of other shapes, or NaN.
    """
    sums: Counter[str] = Counter()
    kind, causal = "", any(word in type(dense).__name__ for word in ("CausalLM", "LMHead"))
    with evaluating(dense, other):
        for batch in batches:
            y, kind = main_output(dense, call(dense, batch))
            given, _ = main_output(dense, call(other, batch))
            if y.shape != given.shape:
                raise ValueError(f"outputs of shape {tuple(given.shape)} cannot be those of {tuple(y.shape)}")
            sums.update(_sums(y, given, kind))
            ids = _ids(batch)
            if kind == "language" and causal and ids is not None and ids.shape[-1] > 1:
                sums.update(_own_loss(y, given, ids))
    if not sums:
        raise ValueError("there is no batch to compare outputs on")
    found = _means(sums)
    if not all(math.isfinite(value) for value in found.values()):
        raise ValueError(f"the outputs hold NaN or infinity: {found}")
    main = "pooled_cosine" if "pooled_cosine" in found else MAIN[kind]
    return {"kind": kind, "main": main, **found, "examples": int(sums["examples"])}


def _sums(y: Tensor, given: Tensor, kind: str) -> dict[str, float]:
    y, given = y.float(), given.float()
    sums = {
        "examples": len(y),
        "vectors": y[..., 0].numel(),
        "cosine": F.cosine_similarity(y, given, dim=-1).double().sum(),
        "difference": (y - given).double().square().sum(),
        "size": y.double().square().sum(),
    }
    if kind == "features" and y.ndim == 3:
        pooled = F.cosine_similarity(y.mean(1), given.mean(1), dim=-1)
        sums["pooled_cosine"] = pooled.double().sum()
    if kind != "features":
        sums["top1_agreement"] = (y.argmax(-1) == given.argmax(-1)).double().sum()
    if kind == "language":
        sums["kl"] = kl(given, y).double() * y[..., 0].numel()
    return {name: float(value) for name, value in sums.items()}


def kl(given: Tensor, wanted: Tensor) -> Tensor:
    """Mean Kullback–Leibler divergence of two tensors of logits, from `wanted` to `given`, in nats."""
    ours, theirs = (t.reshape(-1, t.shape[-1]).float().log_softmax(-1) for t in (given, wanted))
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def _ids(batch: Any) -> Tensor | None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.ndim == 2 else None


def _own_loss(y: Tensor, given: Tensor, ids: Tensor) -> dict[str, float]:
    """Sums of both models' losses on the next token of their own inputs."""
    wanted = ids[:, 1:].reshape(-1)

    def loss(logits: Tensor) -> float:
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted, reduction="sum"))

    return {"loss_dense": loss(y), "loss": loss(given), "next_tokens": wanted.numel()}


def _means(sums: Counter[str]) -> dict[str, float]:
    found = {
        name: sums[name] / sums["vectors"] for name in ("cosine", "top1_agreement", "kl") if name in sums
    }
    # A dense network whose outputs are all zero is met exactly or not at all.
    size = sums["size"] or 1.0
    found["relative_error"] = math.sqrt(sums["difference"] / size)
    if "pooled_cosine" in sums:
        found["pooled_cosine"] = sums["pooled_cosine"] / sums["examples"]
    if "next_tokens" in sums:
        found["perplexity_dense"] = math.exp(sums["loss_dense"] / sums["next_tokens"])
        found["perplexity"] = math.exp(sums["loss"] / sums["next_tokens"])
    return found

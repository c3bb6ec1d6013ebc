"""Agreement of two models' outputs, against values worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from eugen.capture import evaluating
from eugen.compression.outputs import agreement, kl, main_output
from tests.eugen.blocks import generator


class Gives(nn.Module):
    """Gives what it is told, whatever it is asked."""

    def __init__(self, output, **attributes) -> None:
        super().__init__()
        self.output = output
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, _):
        return self.output


class GivesCausalLM(Gives):
    """One that is causal by its name."""


def call(model, batch):
    return model(batch)


def language(values, of=Gives):
    config = SimpleNamespace(vocab_size=values.shape[-1])
    return of(SimpleNamespace(logits=values), config=config)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def test_a_scaled_output_has_cosine_one_and_its_scale_as_error():
    y = random(5, 7, 3)
    found = agreement(Gives(y), Gives(1.25 * y), [0, 1], call=call)
    assert found["kind"] == "features" and found["main"] == "pooled_cosine"
    assert found["cosine"] == pytest.approx(1) and found["pooled_cosine"] == pytest.approx(1)
    assert found["relative_error"] == pytest.approx(0.25)
    assert found["examples"] == 10


def test_cosines_are_means_over_tokens_and_over_examples():
    y = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    given = torch.tensor([[[1.0, 0.0], [0.0, -2.0]]])
    found = agreement(Gives(y), Gives(given), [0], call=call)
    assert found["cosine"] == pytest.approx((1 - 1) / 2)
    assert found["pooled_cosine"] == pytest.approx((1 * 1 + 2 * -2) / (math.sqrt(5) * math.sqrt(5)))
    assert found["relative_error"] == pytest.approx(4 / math.sqrt(5))


def test_classes_agree_in_their_first_choice():
    y = torch.eye(4)
    given = y[[0, 1, 3, 2]]
    found = agreement(Gives(y, num_classes=4), Gives(given), [0], call=call)
    assert (found["kind"], found["main"]) == ("classes", "top1_agreement")
    assert found["top1_agreement"] == 0.5
    assert "top1_agreement" not in agreement(Gives(y), Gives(given), [0], call=call)


def test_batches_weigh_by_their_examples():
    class Echo(nn.Module):
        num_classes = 2

        def __init__(self, sign):
            super().__init__()
            self.sign = sign

        def forward(self, x):
            return x * self.sign(x)

    same = Echo(lambda x: 1)
    turned = Echo(lambda x: 1 if len(x) == 3 else -1)
    batches = [random(3, 2), random(1, 2)]
    assert agreement(same, turned, batches, call=call)["top1_agreement"] == 0.75


def test_the_divergence_of_logits_by_its_definition():
    y, given = random(2, 3, 5), random(2, 3, 5, seed=1)
    p, q = (t.double().softmax(-1) for t in (y, given))
    wanted = (p * (p / q).log()).sum(-1).mean()
    found = agreement(language(y), language(given), [torch.zeros(2, 3, dtype=torch.int64)], call=call)
    assert (found["kind"], found["main"]) == ("language", "kl")
    assert found["kl"] == pytest.approx(float(wanted), rel=1e-5)
    assert float(kl(given, y)) == pytest.approx(float(wanted), rel=1e-5)
    assert "perplexity" not in found  # nothing says that it predicts the next token


def test_the_perplexity_of_a_causal_model_is_of_the_next_token():
    ids = torch.tensor([[0, 2, 1, 2]])
    sure = 20 * nn.functional.one_hot(ids.roll(-1, 1), 3).float()
    flat = torch.zeros(1, 4, 3)
    found = agreement(language(sure, GivesCausalLM), language(flat, GivesCausalLM), [ids], call=call)
    assert found["perplexity_dense"] == pytest.approx(1, abs=1e-6)
    assert found["perplexity"] == pytest.approx(3)


def test_the_output_is_found_in_what_models_give():
    y = random(2, 3)
    for given in (y, (torch.ones(2, dtype=torch.int64), y), {"a": y}, SimpleNamespace(last_hidden_state=y)):
        found, kind = main_output(nn.Identity(), given)
        assert found is y and kind == "features"
    with pytest.raises(ValueError, match="without a tensor of floating point"):
        main_output(nn.Identity(), (torch.ones(2, dtype=torch.int64),))


def test_what_cannot_be_compared_is_refused():
    y = random(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 2\) cannot be those of \(2, 3\)"):
        agreement(Gives(y), Gives(y[:, :2]), [0], call=call)
    with pytest.raises(ValueError, match="no batch"):
        agreement(Gives(y), Gives(y), [], call=call)
    with pytest.raises(ValueError, match="NaN"):
        agreement(Gives(y), Gives(y * math.nan), [0], call=call)


def test_modes_are_what_they_were():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training and model[0].training and not model[1].training

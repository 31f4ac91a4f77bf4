"""BERT against numbers printed by Megatron-LM for a tiny fp32 model on the CPU (tests/golden/data/README.md).

Weights, names and tolerances are those of test_model_gpt.py. Behind the end of a text the reference sees everything,
Megalith what else is behind it; nothing reads those places, so they are not compared.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalith.models.bert import Bert
from tests.golden.test_model_gpt import assert_near, fill, golden_config, num_parameters, our_name

VARIANTS = {"binary_head": True, "no_binary_head": False}


@pytest.fixture(scope="module")
def figures(golden: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((golden / "model_bert.json").read_text())
    return figures


def our_bert_name(theirs: str) -> str:
    name = theirs.replace("tokentype_embeddings", "token_type_embedding").replace("pooler.dense", "pooler")
    return our_name(name.replace("lm_head.layernorm", "lm_head.norm")).removeprefix("embedding.")


def golden_bert(figures: dict[str, Any], variant: str) -> Bert:
    config = golden_config(
        bert_binary_head=VARIANTS[variant],
    )
    model = Bert(config, figures["padded_vocab_size"])
    return fill(model, figures[variant]["parameters"], our_bert_name)


def inputs_of(case: dict[str, Any]) -> dict[str, Tensor]:
    return {
        "tokens_BT": torch.tensor(case["tokens"]),
        "types_BT": torch.tensor(case["types"]),
        "padding": torch.tensor(case["padding_mask"]),
    }


def targets_of(case: dict[str, Any]) -> dict[str, Tensor]:
    mask, order = torch.tensor(case["loss_mask"]), torch.tensor(case["is_random"])
    return {
        "labels": torch.tensor(case["labels"]),
        "loss_weights": mask / mask.sum(),
        "order": order,
        "order_weights": torch.full(order.shape, 1 / len(order)),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_and_losses_are_those_of_megatron(figures: dict[str, Any], variant: str) -> None:
    case = figures[variant]
    model = golden_bert(figures, variant)
    hidden = model(**inputs_of(case))
    real = torch.tensor(case["padding_mask"]).bool()
    losses = model.token_losses(hidden, torch.tensor(case["labels"]))
    assert_near(losses[real], torch.tensor(case["per_token_losses"])[real].tolist(), "losses")
    sums = model(**inputs_of(case), **targets_of(case))
    assert_near(sums[0], case["lm_loss"], "lm loss")
    assert_near(sums.sum(), case["total_loss"], "total loss")
    assert len(sums) == (2 if VARIANTS[variant] else 1)
    if VARIANTS[variant]:
        assert_near(model.order_scores(hidden), case["sop_logits"], "scores of the order")
    # The scores, from which the loss takes another way.
    logs = torch.log_softmax(model.token_scores(hidden), -1)
    assert_near(-logs.gather(-1, torch.tensor(case["labels"])[..., None])[..., 0], losses.tolist(), "scores")
    assert num_parameters(model) == sum(torch.Size(shape).numel() for _, shape in case["parameters"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_megatron(figures: dict[str, Any], variant: str) -> None:
    case = figures[variant]
    model = golden_bert(figures, variant)
    model(**inputs_of(case), **targets_of(case)).sum().backward()
    parameters = dict(model.named_parameters())
    assert len(case["grad_norm_and_sum"]) == len(parameters)
    for name, (norm, total) in case["grad_norm_and_sum"].items():
        grad = parameters[our_bert_name(name)].grad
        assert grad is not None
        assert_near(grad.norm(), norm, name)
        assert abs(float(grad.double().sum()) - total) < 1e-6 * float(grad.abs().sum()) + 1e-8, name

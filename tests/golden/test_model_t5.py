"""T5 against numbers printed by Megatron-LM for a tiny fp32 model on the CPU; tolerances as in test_model_gpt.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megalith.models.t5 import T5
from tests.golden.test_model_gpt import assert_near, fill, golden_config, num_parameters

# The reference's names, without the prefix of the whole model, and ours. Its norms are called by what comes before.
RENAMED = {
    "language_model.": "",
    "embedding.word_embeddings": "word_embedding",
    "embedding.position_embeddings": "position_embedding",
    "encoder.final_layernorm": "encoder_norm",
    "decoder.final_layernorm": "final_norm",
    ".layers": "",
    "input_layernorm": "attention_norm",
    "self_attention.query_key_value": "attention.qkv",
    "self_attention.dense": "attention.out",
    "post_inter_attention_layernorm": "feedforward_norm",
    "inter_attention.dense": "cross.out",
    "inter_attention": "cross",
    "mlp.dense_h_to_4h": "feedforward.up",
    "mlp.dense_4h_to_h": "feedforward.down",
    "lm_head.bias": "output_bias",
}


def our_name(theirs: str) -> str:
    after_attention = "cross_norm" if ".decoder." in theirs else "feedforward_norm"
    name = theirs.replace("post_attention_layernorm", after_attention)
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


@pytest.fixture(scope="module")
def figures(golden: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((golden / "model_t5.json").read_text())
    return figures


@pytest.fixture(scope="module")
def model(figures: dict[str, Any]) -> T5:
    config = golden_config()
    model = T5(config, figures["padded_vocab_size"])
    return fill(model, figures["parameters"], our_name)


def inputs_of(figures: dict[str, Any]) -> dict[str, torch.Tensor]:
    encoder, decoder = torch.tensor(figures["enc"]), torch.tensor(figures["dec"])
    return {"tokens_BP": torch.cat([encoder, decoder], 1), "padding": (encoder < 1).int()}


def test_losses_are_those_of_megatron(figures: dict[str, Any], model: T5) -> None:
    inputs = inputs_of(figures)
    labels, weights = torch.tensor(figures["labels"]), torch.tensor(figures["loss_mask"])
    stream = model.stream(inputs["tokens_BP"], inputs["padding"], None)[:, inputs["padding"].shape[1] :]
    losses = model.token_losses(model.hidden(stream), labels)
    # Behind the end of a text, where nothing counts, Megatron-LM lets a token see all tokens alike, future ones too.
    counts = weights > 0
    assert_near(losses[counts], torch.tensor(figures["per_token_losses"])[counts].tolist(), "losses")
    loss = model(**inputs, labels=labels, loss_weights=weights / weights.sum())
    assert_near(loss, figures["loss"], "loss")
    assert num_parameters(model) == sum(torch.Size(shape).numel() for _, shape in figures["parameters"])


def test_logits_give_the_same_losses(figures: dict[str, Any], model: T5) -> None:
    logits = model(**inputs_of(figures)).double()
    losses = torch.nn.functional.cross_entropy(logits.mT, torch.tensor(figures["labels"]), reduction="none")
    counts = torch.tensor(figures["loss_mask"]) > 0
    assert_near(losses[counts].float(), torch.tensor(figures["per_token_losses"])[counts].tolist(), "losses")


def test_gradients_are_those_of_megatron(figures: dict[str, Any], model: T5) -> None:
    labels, weights = torch.tensor(figures["labels"]), torch.tensor(figures["loss_mask"])
    model.zero_grad()
    model(**inputs_of(figures), labels=labels, loss_weights=weights / weights.sum()).backward()
    parameters = dict(model.named_parameters())
    assert len(figures["grad_norm_and_sum"]) == len(parameters)
    for name, (norm, total) in figures["grad_norm_and_sum"].items():
        grad = parameters[our_name(name)].grad
        assert grad is not None
        assert_near(grad.norm(), norm, name)
        assert abs(float(grad.double().sum()) - total) < 1e-6 * float(grad.abs().sum()) + 1e-8, name

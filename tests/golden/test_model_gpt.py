"""GPT against numbers printed by Megatron-LM for a tiny fp32 model on the CPU (tests/golden/data/README.md).

Both sides compute in fp32 with differently ordered sums. Rounding of single operations is 6e-8 of the values that pass
through; three layers of them leave some 1e-6 of the largest value of a tensor, which is the tolerance here. A mistake
in any formula is far above it: the two forms of GELU alone differ by 1e-4.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from megalith.models.decoder import Decoder
from megalith.models.settings import ModelConfig

Model = TypeVar("Model", bound=nn.Module)

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_qk_scaling": {"apply_query_key_layer_scaling": False},
    "post_ln_residual": {"apply_residual_connection_post_layernorm": True},
    "openai_gelu_nofusion": {"bias_gelu_fusion": False, "openai_gelu": True},
    "erf_gelu_nofusion": {"bias_gelu_fusion": False},
    "reset_all_eod": {},
}

# The reference's names, without the prefix of the whole model, and ours.
RENAMED = {
    "embedding.word_embeddings": "word_embedding",
    "embedding.position_embeddings": "position_embedding",
    "encoder.final_layernorm": "final_norm",
    "encoder.layers": "layers",
    "input_layernorm": "attention_norm",
    "self_attention.query_key_value": "attention.qkv",
    "self_attention.dense": "attention.out",
    "post_attention_layernorm": "feedforward_norm",
    "mlp.dense_h_to_4h": "feedforward.up",
    "mlp.dense_4h_to_h": "feedforward.down",
}


@pytest.fixture(scope="module")
def figures(golden: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((golden / "model_gpt.json").read_text())
    return figures


def assert_near(actual: Tensor, expected: Any, what: str) -> None:
    """Equal but for fp32 rounding, as above: logits here are below 3, losses near 6.5, gradient norms below 1."""
    torch.testing.assert_close(
        actual.detach(), torch.tensor(expected), rtol=2e-6, atol=1e-6, msg=lambda text: f"{what}: {text}"
    )


def our_name(theirs: str) -> str:
    name = theirs.removeprefix("language_model.")
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def formula(number: int, name: str, shape: list[int]) -> Tensor:
    """The weights that the golden model was given: weight_formula in the file."""
    i = torch.arange(math.prod(shape), dtype=torch.int64)
    values = (((31 * i * i + 17 * i + 101 * number + 7) % 1009).double() / 1009 - 0.5) * 0.6
    if name.endswith("layernorm.weight"):
        values = 1 + 0.5 * values
    return values.float().view(shape)


def golden_config(**settings: Any) -> ModelConfig:
    """The sizes of all golden models."""
    return ModelConfig(
        num_layers=3,
        hidden_size=16,
        num_attention_heads=4,
        max_position_embeddings=16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **settings,
    )


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def fill(model: Model, listed: Sequence[tuple[str, list[int]]], our_name: Callable[[str], str]) -> Model:
    """The model with the golden weights. listed: the reference's parameters, each of which must be one here."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for number, (name, shape) in enumerate(listed):
            parameters.pop(our_name(name)).copy_(formula(number, name, shape))
    assert not parameters
    return model


def golden_decoder(figures: dict[str, Any], **settings: Any) -> Decoder:
    model = Decoder(golden_config(**settings), figures["padded_vocab_size"])
    return fill(model, figures["parameters"], our_name)


def documents_of(tokens_BT: Tensor, eod: int) -> Tensor:
    """A document number per token; the end-of-document token belongs to the document that it ends."""
    ends_BT = (tokens_BT == eod).int()
    return (ends_BT.cumsum(1) - ends_BT).int()


def inputs_of(case: dict[str, Any], *, separate: bool) -> dict[str, Any]:
    tokens = torch.tensor(case["tokens"])
    mask = torch.tensor(case["loss_mask"])
    inputs = {
        "tokens_BT": tokens[:, :-1],
        "positions_BT": torch.tensor(case["position_ids"]),
        "labels": tokens[:, 1:],
        "loss_weights": mask / mask.sum(),
    }
    if separate:
        inputs["documents"] = documents_of(tokens[:, :-1], case["eod"])
    return inputs


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_losses_are_those_of_megatron(figures: dict[str, Any], variant: str) -> None:
    case = figures[variant]
    model = golden_decoder(figures, **VARIANTS[variant])
    inputs = inputs_of(case, separate=variant == "reset_all_eod")
    labels, weights = inputs.pop("labels"), inputs.pop("loss_weights")

    logits = model(**inputs)
    assert list(logits.shape) == case["logits_shape"]
    assert_near(logits[0, 0, :16], case["logits_0_0_first16"], "first logits")
    assert_near(logits[1, 11, -16:], case["logits_1_11_last16"], "last logits")
    losses = model.token_losses(model.hidden(model.stream(**inputs)), labels)
    assert_near(losses, case["per_token_losses"], "losses")
    loss = model(**inputs, labels=labels, loss_weights=weights)
    assert_near(loss, case["loss"], "loss")
    assert num_parameters(model) == case["num_parameters"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_megatron(figures: dict[str, Any], variant: str) -> None:
    case = figures[variant]
    model = golden_decoder(figures, **VARIANTS[variant])
    model(**inputs_of(case, separate=variant == "reset_all_eod")).backward()
    parameters = dict(model.named_parameters())
    assert len(case["grad_norm_and_sum"]) == len(parameters)
    for name, (norm, total) in case["grad_norm_and_sum"].items():
        grad = parameters[our_name(name)].grad
        assert grad is not None
        assert_near(grad.norm(), norm, name)
        # Sums cancel, so their error is in proportion to what is summed, not to what is left.
        assert abs(float(grad.double().sum()) - total) < 1e-6 * float(grad.abs().sum()) + 1e-8, name


def test_the_document_mask_is_the_one_of_megatron(figures: dict[str, Any]) -> None:
    case = figures["reset_all_eod"]
    documents = documents_of(torch.tensor(case["tokens"])[:, :-1], case["eod"])
    visible = (documents[:, :, None] == documents[:, None, :]).tril()
    assert (~visible[:, None]).int().tolist() == case["attention_mask_True_means_blocked"]


def learning_rate(samples: int, *, top: float, bottom: float, warm_up: int, decay: int) -> float:
    if samples <= warm_up:
        return top * samples / warm_up
    done = (samples - warm_up) / (decay - warm_up)
    return bottom + (top - bottom) * 0.5 * (math.cos(math.pi * done) + 1)


def test_ten_adam_steps_are_those_of_megatron(figures: dict[str, Any]) -> None:
    model = golden_decoder(figures)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    assert [
        [0.01, len(decayed), sum(map(Tensor.numel, decayed))],
        [0.0, len(plain), sum(map(Tensor.numel, plain))],
    ] == (figures["weight_decay_groups"])
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], lr=0.0, eps=1e-8
    )
    positions = torch.arange(12).expand(2, 12)
    weights = torch.full((2, 12), 1 / 24)
    expected = figures["train_10_steps"]
    for t, (step, used_rate, _, loss_before, norm_before) in enumerate(expected["steps"]):
        b, i = torch.arange(2)[:, None], torch.arange(13)
        tokens = (7 * i + 3 * b + 1 + 5 * t) % 490
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], positions, labels=tokens[:, 1:], loss_weights=weights)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = learning_rate(2 * (step - 1), top=0.01, bottom=0.001, warm_up=4, decay=20)
        assert rate == pytest.approx(used_rate, rel=1e-12)
        torch.testing.assert_close(loss.detach(), torch.tensor(loss_before), rtol=1e-6, atol=0)
        torch.testing.assert_close(norm, torch.tensor(norm_before), rtol=2e-6, atol=0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    parameters = dict(model.named_parameters())
    assert len(expected["final_param_norms"]) == len(parameters)
    for name, norm in expected["final_param_norms"].items():
        value = parameters[our_name(name)].detach()
        if name.endswith("query_key_value.bias"):
            check_key_biases(value, norm, total_rate=sum(rate for _, rate, *_ in expected["steps"]))
        else:
            torch.testing.assert_close(value.norm(), torch.tensor(norm), rtol=1e-6, atol=0)


def check_key_biases(bias: Tensor, norm: float, *, total_rate: float) -> None:
    """Queries' and values' biases are determined; keys' are not, so only their distance from ours is bounded.

    A key bias adds the same to all scores of a query, which the softmax takes away: its gradient is rounding alone, and
    Adam makes of it steps of up to the learning rate in either direction, on both sides.
    """
    parts = bias.view(4, 3, 4)
    rest = norm**2 - float(parts[:, 0].square().sum() + parts[:, 2].square().sum())
    ours = float(parts[:, 1].norm())
    assert abs(math.sqrt(rest) - ours) < 2 * total_rate * math.sqrt(16)

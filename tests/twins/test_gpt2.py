"""GPT against Hugging Face's GPT2LMHeadModel with the same random weights: logits, loss and gradients.

Both are fp32; what differs is the order of sums. The tolerance is 2e-6 of the largest value of each tensor.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megalith.models.decoder import Decoder
from megalith.models.settings import ModelConfig

transformers = pytest.importorskip("transformers")

B, T, V = 2, 15, 40

# The twin's own settings and ours for the same model.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gelu_new": ({}, {}),
    "gelu": ({"activation_function": "gelu"}, {"bias_gelu_fusion": False}),
    "gelu_pytorch_tanh": ({"activation_function": "gelu_pytorch_tanh"}, {"openai_gelu": True}),
    "scaled_by_layer": ({"scale_attn_by_inverse_layer_idx": True}, {}),
    "eager": ({"attn_implementation": "eager", "reorder_and_upcast_attn": True}, {}),
    "inner_width_and_epsilon": (
        {"n_inner": 20, "layer_norm_epsilon": 1e-3},
        {"ffn_hidden_size": 20, "layernorm_epsilon": 1e-3},
    ),
    "one_layer_one_head": ({"n_layer": 1, "n_head": 1}, {"num_layers": 1, "num_attention_heads": 1}),
    "untied": ({"tie_word_embeddings": False}, {"untie_embeddings_and_output_weights": True}),
}


def our_weight(weights: dict[str, Tensor], name: str, num_heads: int) -> Tensor:
    """The twin's weight or gradient of our parameter: its products are transposed, its q, k, v are whole blocks."""
    if name == "output.weight":
        return weights["lm_head.weight"]
    renamed = name
    for ours, theirs in {
        "word_embedding": "wte",
        "position_embedding": "wpe",
        "final_norm": "ln_f",
        "layers.": "h.",
        "attention_norm": "ln_1",
        "feedforward_norm": "ln_2",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "feedforward.up": "mlp.c_fc",
        "feedforward.down": "mlp.c_proj",
    }.items():
        renamed = renamed.replace(ours, theirs)
    value = weights[f"transformer.{renamed}"]
    if value.dim() == 2 and ".h." in f".{renamed}":
        value = value.T
    if "c_attn" in renamed:
        # [3, heads, K, ...] to [heads, 3, K, ...]
        value = value.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)
    return value


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_those_of_the_hugging_face_model(case: str) -> None:
    twin_options, our_options = CASES[case]
    shape = {"vocab_size": V, "n_positions": 16, "n_embd": 24, "n_layer": 3, "n_head": 4}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2}
    torch.manual_seed(1)
    twin = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**(shape | still | twin_options), bos_token_id=0, eos_token_id=0)
    ).train()
    with torch.no_grad():
        for parameter in twin.parameters():  # biases and norms do not start where they would hide a mistake
            parameter += 0.1 * torch.randn_like(parameter)
    settings: dict[str, Any] = {
        "num_layers": 3,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    model = Decoder(ModelConfig(**(settings | our_options)), V)
    num_heads = twin.config.n_head
    twin_weights = dict(twin.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(our_weight(twin_weights, name, num_heads))
        if case == "scaled_by_layer":
            # What the twin divides scores by, our model has in the weights of the queries.
            for number, block in enumerate(model.layers.values()):
                for parameter in block.attention.qkv.parameters():  # type: ignore[union-attr]
                    parameter.view(num_heads, 3, -1)[:, 0] /= number + 1

    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))
    expected = twin(input_ids=tokens, labels=tokens)
    expected.loss.backward()
    positions = torch.arange(T).expand(B, T)
    logits = model(tokens, positions)
    assert_near(logits, expected.logits, "logits")
    # The twin scores each token against the next and leaves the last out.
    weights = torch.full((B, T - 1), 1 / (B * (T - 1)))
    loss = model(tokens[:, :-1], positions[:, :-1], labels=tokens[:, 1:], loss_weights=weights)
    loss.backward()
    assert_near(loss, expected.loss, "loss")
    if case == "scaled_by_layer":
        return  # gradients of rescaled weights are rescaled themselves
    twin_grads = {name: p.grad for name, p in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert_near(parameter.grad, our_weight(twin_grads, name, num_heads), name)


def assert_near(actual: Tensor, expected: Tensor, what: str) -> None:
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(
        actual.detach(), expected.detach(), rtol=0, atol=2e-6 * largest, msg=lambda text: f"{what}: {text}"
    )

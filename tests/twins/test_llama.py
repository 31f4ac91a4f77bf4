"""A GPT with Llama's, Qwen2's and Qwen3's options against Hugging Face's models of these with the same random weights.

Both are fp32; what differs is the order of sums. The tolerance is 4e-6 of the largest value of each tensor.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megalith.models.decoder import Decoder
from megalith.models.settings import ModelConfig

transformers = pytest.importorskip("transformers")

B, T, V, HEADS = 2, 15, 40, 4
ROUNDING = 4e-6

# The twin's own settings and ours for the same model.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "another base": ({"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}, {"rotary_base": 50.0}),
    # Of its three pairs of features one turns as before, one is between, one is slower.
    "angles for long texts": (
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e9,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "max_position_embeddings": 131072,
        },
        {"rotary_base": 1e9, "use_rope_scaling": True, "rope_scaling_factor": 32.0, "max_position_embeddings": 131072},
    ),
    "wide heads": ({"head_dim": 10}, {"kv_channels": 10}),
    "grouped": ({"num_key_value_heads": 2}, {"group_query_attention": True, "num_query_groups": 2}),
    "one group, biases": (
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        {"group_query_attention": True, "add_bias_linear": True},
    ),
    "tied": ({"tie_word_embeddings": True}, {"untie_embeddings_and_output_weights": False}),
    "qwen2": (
        {"model_type": "qwen2", "num_key_value_heads": 2},
        {"add_qkv_bias": True, "group_query_attention": True, "num_query_groups": 2},
    ),
    "qwen2, tied": (
        {"model_type": "qwen2", "num_key_value_heads": HEADS, "tie_word_embeddings": True},
        {"add_qkv_bias": True, "untie_embeddings_and_output_weights": False},
    ),
    "qwen3": (
        {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 10},
        {"qk_layernorm": True, "kv_channels": 10, "group_query_attention": True, "num_query_groups": 2},
    ),
    "qwen3, tied, another epsilon": (
        {"model_type": "qwen3", "num_key_value_heads": HEADS, "head_dim": 6, "tie_word_embeddings": True}
        | {"rms_norm_eps": 0.1},
        {"qk_layernorm": True, "layernorm_epsilon": 0.1, "untie_embeddings_and_output_weights": False},
    ),
}


def twin_of(**options: Any) -> Any:
    """A tiny Llama or Qwen with random weights."""
    shape = {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": 24,
        "intermediate_size": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.2,
    }
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(**(shape | options), bos_token_id=0, eos_token_id=0, pad_token_id=None)
    twin = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in twin.parameters():  # norms do not start where they would hide a mistake
            parameter += 0.1 * torch.randn_like(parameter)
    return twin


def model_for(**options: Any) -> Decoder:
    """Ours of the same shape, without weights yet."""
    settings: dict[str, Any] = {
        "num_layers": 3,
        "hidden_size": 24,
        "ffn_hidden_size": 28,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 16,
        "layernorm_epsilon": 1e-6,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "swiglu": True,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True,
    }
    return Decoder(ModelConfig(**(settings | options)), V)


def our_weight(weights: dict[str, Any], name: str) -> Tensor:
    """The twin's weight or gradient of our parameter."""
    if name == "output.weight":
        head: Tensor = weights["lm_head.weight"]
        return head
    renamed = name
    for ours, theirs in {
        "word_embedding": "embed_tokens",
        "final_norm": "norm",
        "attention_norm": "input_layernorm",
        "feedforward_norm": "post_attention_layernorm",
        "attention.out": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "feedforward": "mlp",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.up_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.down": "mlp.down_proj",
    }.items():
        renamed = renamed.replace(ours, theirs)
    if "attention.qkv" not in name:
        value: Tensor = weights[f"model.{renamed}"]
        return value
    q, k, v = (weights["model." + renamed.replace("attention.qkv", f"self_attn.{part}_proj")] for part in "qkv")
    # Every group's queries, then its key and value.
    groups, width = (k.shape[0] * HEADS) // q.shape[0], q.shape[0] // HEADS
    return torch.cat([part.unflatten(0, (groups, -1, width)) for part in (q, k, v)], 1).flatten(0, 2)


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_those_of_the_hugging_face_model(case: str) -> None:
    twin_options, our_options = CASES[case]
    twin, model = twin_of(**twin_options), model_for(**our_options)
    twin_weights = dict(twin.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(our_weight(twin_weights, name))
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))
    expected = twin(input_ids=tokens, labels=tokens)
    expected.loss.backward()
    positions = torch.arange(T).expand(B, T)
    assert_near(model(tokens, positions), expected.logits, "logits")
    # The twin scores each token against the next and leaves the last out.
    weights = torch.full((B, T - 1), 1 / (B * (T - 1)))
    loss = model(tokens[:, :-1], positions[:, :-1], labels=tokens[:, 1:], loss_weights=weights)
    loss.backward()
    assert_near(loss, expected.loss, "loss")
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert_near(parameter.grad, our_weight(gradients, name), name)


def assert_near(actual: Tensor, expected: Tensor, what: str) -> None:
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(
        actual.detach(), expected.detach(), rtol=0, atol=ROUNDING * largest, msg=lambda text: f"{what}: {text}"
    )

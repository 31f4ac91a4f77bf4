"""T5 against Hugging Face's with the same random weights: logits, loss and gradients, of version 1.0 and 1.1.

Both sides are fp32 and differ in the order of sums. A gradient at the first norm of the encoder has passed 15 branches,
of a ViT of as many layers 6, for which 2e-6 of the largest value of a tensor is the tolerance; here it is 4e-6. A
mistake is far above it: the two forms of GELU alone differ by 1e-4.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megalith.layers.relative import distance_rows
from megalith.models.settings import ModelConfig
from megalith.models.t5 import T5

transformers = pytest.importorskip("transformers")

B, E, T, V = 3, 14, 9, 48
D, HEADS, HEAD, LAYERS, INNER = 24, 4, 5, 3, 40
PAD = 0

# Version 1.1 has a gate in the feed-forward and an output of its own.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1.0": ({}, {"activation_function": "relu", "scale_decoder_outputs": True}),
    "1.1": (
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"activation_function": "gated-gelu"},
    ),
    "1.0_few_distances": (
        {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 11, "num_layers": 1},
        {
            "activation_function": "relu",
            "scale_decoder_outputs": True,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 11,
            "num_layers": 1,
        },
    ),
}


def twin_of(options: dict[str, Any]) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": V,
        "d_model": D,
        "d_kv": HEAD,
        "d_ff": INNER,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "dropout_rate": 0.0,
        "decoder_start_token_id": PAD,
    }
    twin = transformers.T5ForConditionalGeneration(transformers.T5Config(**(settings | options)))
    generator = torch.Generator().manual_seed(1)
    if not twin.config.scale_decoder_outputs:
        # Newer versions of the library tie the tables of 1.1 too, whose files hold two.
        twin.lm_head.weight = torch.nn.Parameter(torch.empty(V, D))
    with torch.no_grad():
        for parameter in twin.parameters():
            # Norms must not start where they would hide a mistake, nor scores so large that one key takes all.
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return twin.train()


def our_model(options: dict[str, Any], *, tied: bool) -> T5:
    settings: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": D,
        "num_attention_heads": HEADS,
        "kv_channels": HEAD,
        "ffn_hidden_size": INNER,
        "max_position_embeddings": 1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "layernorm_epsilon": 1e-6,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "softmax_scale": 1.0,
        "position_embedding_type": "relative",
        "output_bias": False,
        "untie_embeddings_and_output_weights": not tied,
    }
    return T5(ModelConfig(**(settings | options)), V)


RENAMED = {
    "attention.out": "0.SelfAttention.o",
    "attention_norm": "0.layer_norm",
    "cross.query": "1.EncDecAttention.q",
    "cross.out": "1.EncDecAttention.o",
    "cross_norm": "1.layer_norm",
}
WHOLE = {
    "word_embedding.weight": "shared.weight",
    "output.weight": "lm_head.weight",
    "encoder_norm.weight": "encoder.final_layer_norm.weight",
    "final_norm.weight": "decoder.final_layer_norm.weight",
    "encoder_positions.weight": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "decoder_positions.weight": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
}


def our_weight(weights: dict[str, Tensor], name: str) -> Tensor:
    """The twin's weight or gradient of our parameter, whose queries, keys and values are one matrix, by heads."""
    if name in WHOLE:
        return weights[WHOLE[name]]
    stack, number, rest = name.split(".", 2)
    layer = f"{stack}.block.{number}.layer"
    part, _, matrix = rest.removesuffix(".weight").rpartition(".")
    last = f"{layer}.{2 if stack == 'decoder' else 1}"
    if part == "feedforward":
        gated = f"{last}.DenseReluDense.wi_0.weight" in weights
        inner = {"up": "wi_1", "gate": "wi_0", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
        return weights[f"{last}.DenseReluDense.{inner[matrix]}.weight"]
    if matrix == "feedforward_norm":
        return weights[f"{last}.layer_norm.weight"]
    if matrix in ("qkv", "key_value"):
        kind, which = ("0.SelfAttention", "qkv") if matrix == "qkv" else ("1.EncDecAttention", "kv")
        parts = [weights[f"{layer}.{kind}.{letter}.weight"] for letter in which]
        return torch.stack([each.unflatten(0, (HEADS, -1)) for each in parts], 1).flatten(0, 2)
    return weights[f"{layer}.{RENAMED[rest.removesuffix('.weight')]}.weight"]


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest value of the tensor."""
    return float((actual.detach() - expected.detach()).abs().max() / expected.detach().abs().max())


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the encoder, with padding behind two of the texts, labels of the decoder, and where these count."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, V, (B, E), generator=generator)
    tokens[1, 9:] = PAD
    tokens[2, 4:] = PAD
    labels = torch.randint(1, V, (B, T), generator=generator)
    counts = torch.ones(B, T)
    counts[0, 5:] = 0
    return tokens, labels, counts


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_those_of_the_hugging_face_model(case: str) -> None:
    twin_options, our_options = CASES[case]
    twin = twin_of(twin_options)
    model = our_model(our_options, tied=twin.config.scale_decoder_outputs)
    twin_weights = dict(twin.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(our_weight(twin_weights, name))

    tokens, labels, counts = data()
    ignored = labels.masked_fill(counts == 0, -100)
    # It makes the decoder's input of the labels: the start, which is [PAD], then all but the last.
    expected = twin(input_ids=tokens, attention_mask=(tokens != PAD).long(), labels=ignored)
    expected.loss.backward()
    started = torch.cat([torch.full((B, 1), PAD), ignored[:, :-1].masked_fill(ignored[:, :-1] == -100, PAD)], 1)
    inputs = {"tokens_BP": torch.cat([tokens, started], 1), "padding": (tokens == PAD).int()}
    found = {"logits": difference(model(**inputs), expected.logits)}
    loss = model(**inputs, labels=labels, loss_weights=counts / counts.sum())
    loss.backward()
    found["loss"] = difference(loss, expected.loss)
    twin_grads = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = difference(parameter.grad, our_weight(twin_grads, name))
    print(f"largest difference: {max(found.values()):.1e} of the largest value of a tensor")
    assert {name: error for name, error in found.items() if error > 4e-6} == {}


@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 11), (64, 500), (16, 20)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_distances_share_rows_as_in_the_hugging_face_model(buckets: int, longest: int, both_ways: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    ahead = torch.arange(-700, 701)
    expected = T5Attention._relative_position_bucket(
        ahead, bidirectional=both_ways, num_buckets=buckets, max_distance=longest
    )
    rows = distance_rows(ahead, num_buckets=buckets, max_distance=longest, both_ways=both_ways)
    assert rows.tolist() == expected.tolist()

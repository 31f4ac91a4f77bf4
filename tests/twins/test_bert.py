"""BERT against Hugging Face's with the same random weights: scores, losses and all gradients.

With norms after the sums it is BertForPreTraining; with norms in front of the branches, as Megatron-LM has them,
MegatronBertForPreTraining. Both sides are fp32 and differ in the order of sums. What is exact comes from the
twin in fp64: scores and losses are within 2e-6 of a tensor's largest value of it, and gradients, sums that may cancel
down to 0 (for the bias of keys, which the softmax does not see), as near to it as the twin's own in fp32, but for a
factor of 3 for the chance of single roundings.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from megalith.models.bert import Bert
from megalith.models.settings import ModelConfig

transformers = pytest.importorskip("transformers")

B, T, V = 3, 11, 40
D, HEADS, LAYERS = 24, 4, 3

ERF, TANH = {"bias_gelu_fusion": False}, {"bias_gelu_fusion": False, "openai_gelu": True}
CASES: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "post-erf": (True, {"hidden_act": "gelu"}, ERF),
    "post-tanh": (True, {"hidden_act": "gelu_pytorch_tanh"}, TANH),
    "post-inner_width_and_epsilon": (
        True,
        {"intermediate_size": 20, "layer_norm_eps": 1e-3},
        {"ffn_hidden_size": 20, "layernorm_epsilon": 1e-3, **ERF},
    ),
    "pre-erf": (False, {"hidden_act": "gelu"}, ERF),
    "pre-tanh": (False, {"hidden_act": "gelu_pytorch_tanh"}, TANH),
    "pre-one_layer": (False, {"num_hidden_layers": 1}, {"num_layers": 1, **ERF}),
}

RENAMED = {
    "word_embedding": "bert.embeddings.word_embeddings",
    "position_embedding": "bert.embeddings.position_embeddings",
    "token_type_embedding": "bert.embeddings.token_type_embeddings",
    "embedding_norm": "bert.embeddings.LayerNorm",
    "final_norm": "bert.encoder.ln",
    "pooler": "bert.pooler.dense",
    "lm_head.dense": "cls.predictions.transform.dense",
    "lm_head.norm": "cls.predictions.transform.LayerNorm",
    "lm_head.bias": "cls.predictions.bias",
    "binary_head": "cls.seq_relationship",
    "layers": "bert.encoder.layer",
    "attention.out": "attention.output.dense",
    "feedforward.up": "intermediate.dense",
    "feedforward.down": "output.dense",
}
NORMS = {
    True: {"attention_norm": "attention.output.LayerNorm", "feedforward_norm": "output.LayerNorm"},
    False: {"attention_norm": "attention.ln", "feedforward_norm": "ln"},
}


def twin_of(after: bool, options: dict[str, Any]) -> Any:
    settings = {
        "vocab_size": V,
        "hidden_size": D,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * D,
        "max_position_embeddings": 16,
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
        "hidden_act": "gelu",
    } | options
    if after:
        twin = transformers.BertForPreTraining(transformers.BertConfig(**settings))
    else:
        twin = transformers.MegatronBertForPreTraining(transformers.MegatronBertConfig(**settings))
    # Biases and norms must not start where they would hide a mistake.
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return twin.train()


def our_model(after: bool, options: dict[str, Any]) -> Bert:
    settings: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": D,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "norm_after_residual": after,
    }
    return Bert(ModelConfig(**(settings | options)), V)


def our_weight(weights: dict[str, Tensor], name: str, after: bool) -> Tensor:
    """The twin's weight or gradient of our parameter, whose queries, keys and values are one matrix, by heads."""
    if ".attention.qkv." in name:
        layer, kind = name.replace("layers", "bert.encoder.layer").split(".attention.qkv.")
        parts = [weights[f"{layer}.attention.self.{which}.{kind}"] for which in ("query", "key", "value")]
        return torch.stack([part.unflatten(0, (HEADS, -1)) for part in parts], 1).flatten(0, 2)
    for ours, theirs in {**RENAMED, **NORMS[after]}.items():
        name = name.replace(ours, theirs)
    return weights[name]


@pytest.mark.parametrize("case", CASES)
def test_scores_losses_and_gradients_are_those_of_the_hugging_face_model(case: str) -> None:
    after, twin_options, our_options = CASES[case]
    torch.manual_seed(sorted(CASES).index(case))
    twin = twin_of(after, twin_options)
    model = our_model(after, our_options)
    twin_weights = dict(twin.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(our_weight(twin_weights, name, after))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in twin.parameters())

    # The twin learns nothing of token 0 where it is read, for it takes it for padding.
    tokens, types = torch.randint(1, V, (B, T)), torch.randint(2, (B, T))
    padding = (torch.arange(T) < torch.tensor([[T], [T - 4], [T - 1]])).int()
    labels = torch.where((torch.rand(B, T) < 0.4) & (padding > 0), torch.randint(V, (B, T)), -100)
    order = torch.tensor([1, 0, 1])
    inputs = {"input_ids": tokens, "token_type_ids": types, "attention_mask": padding}
    exact_twin = copy.deepcopy(twin).double()
    exact = exact_twin(**inputs, labels=labels, next_sentence_label=order)
    exact.loss.backward()
    twin(**inputs, labels=labels, next_sentence_label=order).loss.backward()

    hidden = model(tokens, types, padding=padding)
    weights = (labels >= 0).float()
    losses = model(
        tokens,
        types,
        padding=padding,
        labels=labels,
        loss_weights=weights / weights.sum(),
        order=order,
        order_weights=torch.full((B,), 1 / B),
    )
    losses.sum().backward()
    largest = Largest()
    real = padding.bool()
    largest.compare(model.token_scores(hidden)[real], exact.prediction_logits[real], "scores of tokens")
    largest.compare(model.order_scores(hidden), exact.seq_relationship_logits, "scores of the order")
    largest.compare(losses.sum(), exact.loss, "loss")
    grads, exact_grads = ({name: p.grad for name, p in of.named_parameters()} for of in (twin, exact_twin))
    of_all = max(float(grad.abs().max()) for grad in exact_grads.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        wanted = our_weight(exact_grads, name, after)
        error = float((parameter.grad - wanted).abs().max())
        its_error = float((our_weight(grads, name, after) - wanted).abs().max())
        assert error <= 3 * its_error + 1e-7 * of_all, f"{name}: {error}, the twin has {its_error}"
        largest.found = max(largest.found, error / of_all)
    print(f"largest difference: {largest.found:.1e} of the largest value of a tensor, or of the gradients")


class Largest:
    """The largest difference found, relative to the largest value of its tensor."""

    def __init__(self) -> None:
        self.found = 0.0

    def compare(self, actual: Tensor, expected: Tensor, what: str) -> None:
        difference = (actual.detach() - expected.detach()).abs().max() / expected.detach().abs().max()
        self.found = max(self.found, float(difference))
        assert difference <= 2e-6, f"{what}: {float(difference)} of the largest value"

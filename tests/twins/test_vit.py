"""ViT against Hugging Face's with the same random weights: scores, loss and gradients.

The fine-tuning head is that of ViTForImageClassification; the pretraining head's inner layer with tanh is the pooler of
ViTModel. Both sides are fp32 and differ in the order of sums. The tolerance is 2e-6 of each tensor's largest value.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.models.settings import ModelConfig
from megalith.models.vit import VisionTransformer, centred

transformers = pytest.importorskip("transformers")

B, SIDE, PATCH, CHANNELS, C = 3, 12, 4, 3, 7
D, HEADS, LAYERS = 24, 4, 3

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "erf": ({"hidden_act": "gelu"}, {"bias_gelu_fusion": False}),
    "tanh": ({"hidden_act": "gelu_pytorch_tanh"}, {}),
    "inner_width_and_epsilon": (
        {"intermediate_size": 20, "layer_norm_eps": 1e-3, "hidden_act": "gelu_pytorch_tanh"},
        {"ffn_hidden_size": 20, "layernorm_epsilon": 1e-3},
    ),
    "one_channel_one_layer": (
        {"num_channels": 1, "num_hidden_layers": 1, "hidden_act": "gelu_pytorch_tanh"},
        {"num_channels": 1, "num_layers": 1},
    ),
}


def twin_config(options: dict[str, Any]) -> Any:
    settings = {
        "hidden_size": D,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * D,
        "image_size": SIDE,
        "patch_size": PATCH,
        "num_channels": CHANNELS,
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }
    return transformers.ViTConfig(**(settings | options), num_labels=C)


def our_model(options: dict[str, Any], *, finetune: bool) -> VisionTransformer:
    settings: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": D,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "img_dim": SIDE,
        "patch_dim": PATCH,
        "num_channels": CHANNELS,
        "num_classes": C,
    }
    return VisionTransformer(ModelConfig(**(settings | options)), finetune=finetune)


RENAMED = {
    "attention_norm": "layernorm_before",
    "feedforward_norm": "layernorm_after",
    "attention.out": "attention.o_proj",
    "feedforward.up": "mlp.fc1",
    "feedforward.down": "mlp.fc2",
    "final_norm": "layernorm",
    "finetuning_head": "classifier",
    "pretraining_head.inner": "pooler.dense",
}


def our_weight(weights: dict[str, Tensor], name: str) -> Tensor:
    """The twin's weight or gradient of our parameter, whose queries, keys and values are one matrix, by heads."""
    weights = {key.removeprefix("vit."): value for key, value in weights.items()}
    if name == "class_token":
        return weights["embeddings.cls_token"].flatten()
    if name == "position_embedding.weight":
        return weights["embeddings.position_embeddings"][0]
    if name == "patch_embedding.weight":
        # The twin's is a convolution: [D, channel, row, column].
        return weights["embeddings.patch_embeddings.projection.weight"].permute(0, 2, 3, 1).flatten(1)
    if name == "patch_embedding.bias":
        return weights["embeddings.patch_embeddings.projection.bias"]
    if ".attention.qkv." in name:
        layer, kind = name.split(".attention.qkv.")
        parts = [weights[f"{layer}.attention.{which}_proj.{kind}"] for which in "qkv"]
        return torch.stack([part.unflatten(0, (HEADS, -1)) for part in parts], 1).flatten(0, 2)
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return weights[name]


def with_random_weights(twin: Any) -> Any:
    """Biases, norms and the class token must not start where they would hide a mistake."""
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return twin.train()


def images_and_labels(channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (B, SIDE, SIDE, channels), dtype=torch.uint8, generator=generator)
    return images, torch.randint(C, (B,), generator=generator)


class Largest:
    """The largest difference found, relative to the largest value of its tensor."""

    def __init__(self) -> None:
        self.found = 0.0

    def compare(self, actual: Tensor, expected: Tensor, what: str) -> None:
        difference = (actual.detach() - expected.detach()).abs().max() / expected.detach().abs().max()
        self.found = max(self.found, float(difference))
        assert difference <= 2e-6, f"{what}: {float(difference)} of the largest value"


@pytest.mark.parametrize("case", CASES)
def test_scores_loss_and_gradients_are_those_of_the_hugging_face_model(case: str) -> None:
    twin_options, our_options = CASES[case]
    torch.manual_seed(1)
    twin = with_random_weights(transformers.ViTForImageClassification(twin_config(twin_options)))
    model = our_model(our_options, finetune=True)
    twin_weights = dict(twin.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(our_weight(twin_weights, name))

    images, labels = images_and_labels(twin.config.num_channels)
    expected = twin(pixel_values=centred(images).permute(0, 3, 1, 2), labels=labels)
    expected.loss.backward()
    scores = model(images)
    loss, accuracy = model(images, labels=labels, loss_weights=torch.full((B,), 1 / B))
    loss.backward()
    largest = Largest()
    largest.compare(scores, expected.logits, "scores")
    largest.compare(loss, expected.loss, "loss")
    assert float(accuracy.detach()) == pytest.approx(float((expected.logits.argmax(-1) == labels).float().mean()))
    twin_grads = {name: p.grad for name, p in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        largest.compare(parameter.grad, our_weight(twin_grads, name), name)
    print(f"largest difference: {largest.found:.1e} of the largest value of a tensor")


def test_the_pretraining_head_is_the_hugging_face_pooler_and_a_linear_layer() -> None:
    torch.manual_seed(1)
    twin = with_random_weights(transformers.ViTModel(twin_config({"hidden_act": "gelu_pytorch_tanh"})))
    model = our_model({}, finetune=False)
    output, output_bias = torch.randn(C, D), torch.randn(C)
    twin_weights = dict(twin.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "pretraining_head.output.weight":
                parameter.copy_(output)
            elif name == "pretraining_head.output.bias":
                parameter.copy_(output_bias)
            else:
                parameter.copy_(our_weight(twin_weights, name))
    images, labels = images_and_labels(CHANNELS)
    pooled = twin(pixel_values=centred(images).permute(0, 3, 1, 2)).pooler_output
    expected = F.linear(pooled, output, output_bias)
    largest = Largest()
    largest.compare(model(images), expected, "scores")
    loss, _ = model(images, labels=labels, loss_weights=torch.full((B,), 1 / B))
    largest.compare(loss, F.cross_entropy(expected, labels), "loss")

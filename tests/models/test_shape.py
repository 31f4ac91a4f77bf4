from dataclasses import replace

import pytest
import torch

from megalith.models.settings import ModelConfig
from megalith.models.shape import block_shape, initial_weights, shape_of

CONFIG = ModelConfig(num_layers=48, hidden_size=24, num_attention_heads=3, max_position_embeddings=16)


def test_sizes_that_are_not_set_follow_from_the_width() -> None:
    shape = shape_of(CONFIG)
    assert (shape.head_width, shape.inner) == (8, 96)


def test_sizes_that_are_set_are_taken() -> None:
    shape = shape_of(replace(CONFIG, kv_channels=5, ffn_hidden_size=7))
    assert (shape.head_width, shape.inner) == (5, 7)


def test_three_matrices_have_the_weights_of_two() -> None:
    # As Megatron-LM's: whole 64s.
    for width, inner in ((4096, 10880), (1600, 4224), (24, 64), (8, 64)):
        assert shape_of(replace(CONFIG, hidden_size=width, kv_channels=8, swiglu=True)).inner == inner
    assert shape_of(replace(CONFIG, swiglu=True, ffn_hidden_size=7)).inner == 7


def test_projections_back_to_the_stream_start_narrower_with_depth() -> None:
    into, out = initial_weights(CONFIG)
    assert into.kind == out.kind == "normal"
    assert into.scale == 0.02
    # As Megatron-LM's for 48 layers: 0.02 / sqrt(96).
    assert out.scale == pytest.approx(0.0020412, rel=1e-4)


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"])
def test_a_missing_size_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is None"):
        shape_of(replace(CONFIG, **{name: None}))  # type: ignore[arg-type]


def test_a_width_that_heads_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size 24 is not divisible by num_attention_heads 5"):
        shape_of(replace(CONFIG, num_attention_heads=5))


def test_the_fused_gelu_is_tanh_and_the_other_settings_speak_without_it() -> None:
    unfused = replace(CONFIG, bias_gelu_fusion=False)
    forms = {
        "tanh": [CONFIG, replace(unfused, openai_gelu=True), replace(CONFIG, onnx_safe=True)],
        "erf": [unfused],
        "onnx": [replace(unfused, onnx_safe=True)],
    }
    for form, configs in forms.items():
        assert [block_shape(config, torch.float32).gelu for config in configs] == [form] * len(configs)

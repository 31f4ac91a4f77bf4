"""Sizes of a transformer, with what the settings leave open filled in."""

from dataclasses import dataclass
from typing import cast

import torch

from megalith.layers.attention import AttentionShape
from megalith.layers.block import BlockShape
from megalith.layers.feedforward import Activation, Gelu
from megalith.layers.initial import Initial
from megalith.layers.norm import Normalization
from megalith.models.settings import ModelConfig

# Settings that make a model another one at the same sizes.
OPTIONS = (
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "activation_function",
    "swiglu",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "use_rope_scaling",
    "rope_scaling_factor",
    "group_query_attention",
    "num_query_groups",
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer."""

    num_layers: int
    width: int  # features of the stream
    num_heads: int
    head_width: int  # features per head
    inner: int  # features inside a feed-forward
    num_positions: int  # rows of the position table, where there is one; the longest sequence


def shape_of(config: ModelConfig) -> Shape:
    """The sizes that the settings give: if not set, heads share the width and feed-forwards have their `inner_width`.

    Raises ValueError if a size is missing or the width cannot be shared out.
    """
    num_layers = _given(config, "num_layers")
    width = _given(config, "hidden_size")
    num_heads = _given(config, "num_attention_heads")
    if config.kv_channels is None and width % num_heads:
        raise ValueError(
            f"hidden_size {width} is not divisible by num_attention_heads {num_heads}: change one or set kv_channels"
        )
    return Shape(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        head_width=width // num_heads if config.kv_channels is None else config.kv_channels,
        inner=inner_width(config),
        num_positions=_given(config, "max_position_embeddings"),
    )


def inner_width(config: ModelConfig) -> int:
    """Features inside a feed-forward: those given, or 4 times the width.

    With --swiglu two thirds of that in whole 64s, so that three matrices have the weights of two; as Megatron-LM has
    it, but at least 64.
    """
    if config.ffn_hidden_size is not None:
        return config.ffn_hidden_size
    wide = 4 * (config.hidden_size or 0)
    return max(64, wide * 2 // 3 // 64 * 64) if config.swiglu else wide


def rotary_width(config: ModelConfig) -> int:
    """Features of a head that turn with its place; 0 where positions are known otherwise."""
    return int(shape_of(config).head_width * config.rotary_percent) if config.position_embedding_type == "rope" else 0


def key_heads(config: ModelConfig) -> int:
    """Heads of keys and values in self-attention."""
    return config.num_query_groups if config.group_query_attention else shape_of(config).num_heads


def options_of(config: ModelConfig) -> dict[str, object]:
    """Those of the OPTIONS that are not at their defaults, by name: a plain GPT has none."""
    plain = ModelConfig()
    return {name: getattr(config, name) for name in OPTIONS if getattr(config, name) != getattr(plain, name)}


def initial_weights(config: ModelConfig) -> tuple[Initial, Initial]:
    """How tables and inner projections start, and how the projections back to the stream do.

    The second are narrower by sqrt(2 num_layers), so that the sum of all residuals has the same scale for any depth.
    """
    std = config.init_method_std
    return Initial("normal", std), Initial("normal", std / (2 * shape_of(config).num_layers) ** 0.5)


def block_shape(config: ModelConfig, dtype: torch.dtype) -> BlockShape:
    """What all blocks of a model with these settings have in common; dtype is that of the computation inside."""
    shape = shape_of(config)
    into, out = initial_weights(config)
    return BlockShape(
        attention=AttentionShape(
            shape.width,
            shape.num_heads,
            shape.head_width,
            into,
            out,
            bias=config.add_bias_linear,
            into_bias=config.add_bias_linear or config.add_qkv_bias,
            num_groups=key_heads(config),
            scale=config.softmax_scale,
            norm=normalization_of(config) if config.qk_layernorm else None,
            epsilon=config.layernorm_epsilon,
        ),
        inner=shape.inner,
        gelu=_gelu(config),
        epsilon=config.layernorm_epsilon,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.hidden_dropout,
        layer_scaling=config.apply_query_key_layer_scaling,
        residual_after_norm=config.apply_residual_connection_post_layernorm,
        norm_after_residual=config.norm_after_residual,
        normalization=normalization_of(config),
        activation=activation_of(config),
        dtype=dtype,
    )


def normalization_of(config: ModelConfig) -> Normalization:
    """The kind of all norms."""
    return cast(Normalization, config.normalization)


def activation_of(config: ModelConfig) -> Activation:
    """What stands inside a feed-forward."""
    return "swiglu" if config.swiglu else cast(Activation, config.activation_function)


def _gelu(config: ModelConfig) -> Gelu:
    # Megatron-LM's fused bias and GELU has the tanh form only; the other settings speak where it is off.
    if config.bias_gelu_fusion or config.openai_gelu:
        return "tanh"
    return "onnx" if config.onnx_safe else "erf"


def _given(config: ModelConfig, name: str) -> int:
    value: int | None = getattr(config, name)
    if value is None or value < 1:
        raise ValueError(f"{name} is {value}: a model needs at least 1, set it")
    return value

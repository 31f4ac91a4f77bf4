"""Llama, Qwen2 and Qwen3 as Hugging Face's library has them: config.json and the names of weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalith.config import Run
from megalith.hugging_face_config import LONGEST_AT_FIRST, count, number, refuse_others
from megalith.hugging_face_weights import Names
from megalith.layers.rotary import FEW_TURNS, FIRST_LENGTH, MANY_TURNS
from megalith.models.shape import key_heads, shape_of


def llama_names(run: Run) -> Names:
    return Names(
        whole={"word_embedding": "model.embed_tokens", "final_norm": "model.norm", "output": "lm_head"},
        blocks={"layers": "model.layers.{}."},
        in_block={
            "attention_norm": ("input_layernorm",),
            "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attention.q_norm": ("self_attn.q_norm",),
            "attention.k_norm": ("self_attn.k_norm",),
            "attention.out": ("self_attn.o_proj",),
            "feedforward_norm": ("post_attention_layernorm",),
            "feedforward.gate": ("mlp.gate_proj",),
            "feedforward.up": ("mlp.up_proj",),
            "feedforward.down": ("mlp.down_proj",),
        },
        prefix="model.",
    )


# What theirs may have with angles for long texts: as Llama 3.1, 3.2 and 3.3 do.
STRETCHED = {
    "low_freq_factor": FEW_TURNS,
    "high_freq_factor": MANY_TURNS,
    "original_max_position_embeddings": FIRST_LENGTH,
}


def llama_settings(config: Mapping[str, Any], where: Path, own_output: bool) -> dict[str, Any]:
    fits: dict[str, tuple[object, ...]] = {
        "hidden_act": ("silu",),
        "mlp_bias": (config.get("attention_bias", False),),
        "is_causal": (True,),
    }
    refuse_others(config, where, fits)
    # Older files have the base beside, and what stretches the angles as rope_scaling, which their library takes first.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{where}: rope_scaling or rope_parameters is {rope!r:.60}; it must be an object")
    kinds = {name: ("default", "llama3") for name in ("rope_type", "type")}
    refuse_others(rope, where, kinds)
    is_stretched = "llama3" in (rope.get("rope_type"), rope.get("type"))
    if is_stretched:
        refuse_others(rope, where, {name: (value,) for name, value in STRETCHED.items()})
    refuse_others({**config, **rope}, where, {"partial_rotary_factor": (1, None)})
    width, heads = count(config, "hidden_size", where), count(config, "num_attention_heads", where)
    groups = count(config, "num_key_value_heads", where, default=heads)
    if heads % groups:
        raise ValueError(f"{where}: num_key_value_heads = {groups} does not divide num_attention_heads = {heads}")
    longest = count(config, "max_position_embeddings", where, default=2048)
    return {
        "num_layers": count(config, "num_hidden_layers", where),
        "hidden_size": width,
        "num_attention_heads": heads,
        "kv_channels": count(config, "head_dim", where, default=width // heads),
        **({"group_query_attention": True, "num_query_groups": groups} if groups != heads else {}),
        "ffn_hidden_size": count(config, "intermediate_size", where),
        "max_position_embeddings": longest,
        "seq_length": min(longest, LONGEST_AT_FIRST),
        "layernorm_epsilon": number(config, "rms_norm_eps", where, default=1e-6),
        "attention_dropout": number(config, "attention_dropout", where, default=0.0),
        "hidden_dropout": 0.0,
        "init_method_std": number(config, "initializer_range", where, default=0.02),
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": bool(config.get("attention_bias", False)),
        "position_embedding_type": "rope",
        "rotary_base": number({**config, **rope}, "rope_theta", where, default=10000.0),
        **({"use_rope_scaling": True, "rope_scaling_factor": _factor(rope, where)} if is_stretched else {}),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
    }


def _factor(rope: Mapping[str, Any], where: Path) -> float:
    factor = number(rope, "factor", where, default=0.0)
    if factor < 1:
        raise ValueError(f"{where}: factor is {factor:g}, of a rope_type llama3; it must be a number of 1 or more")
    return factor


def llama_config(run: Run, vocab_size: int) -> dict[str, Any]:
    shape, model = shape_of(run.model), run.model
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.use_rope_scaling:
        rope = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **STRETCHED}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.width,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": key_heads(model),
        "head_dim": shape.head_width,
        "intermediate_size": shape.inner,
        "hidden_act": "silu",
        "max_position_embeddings": shape.num_positions,
        "rms_norm_eps": model.layernorm_epsilon,
        # Versions of the library before 5 read rope_theta and rope_scaling, later ones rope_parameters.
        "rope_theta": model.rotary_base,
        **({"rope_scaling": {**rope, "rope_theta": model.rotary_base}} if model.use_rope_scaling else {}),
        "rope_parameters": {**rope, "rope_theta": model.rotary_base},
        "attention_bias": model.add_bias_linear,
        "mlp_bias": model.add_bias_linear,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
    }


# What a config.json of a Qwen2 or Qwen3 need not say.
QWENS_USUAL = {"max_position_embeddings": 32768, "num_key_value_heads": 32}


def _qwen_settings(config: Mapping[str, Any], where: Path, own_output: bool) -> dict[str, Any]:
    """What both have. Neither knows of biases in a feed-forward."""
    refuse_others(config, where, {"use_sliding_window": (False,)})
    seen = config.get("layer_types")
    if seen is not None and (not isinstance(seen, list) or any(kind != "full_attention" for kind in seen)):
        raise ValueError(f"{where}: layer_types is {seen!r:.60}; full_attention in every layer can be converted")
    return llama_settings({**QWENS_USUAL, **config, "mlp_bias": False}, where, own_output)


def qwen2_settings(config: Mapping[str, Any], where: Path, own_output: bool) -> dict[str, Any]:
    # Its biases are those of queries, keys and values, whatever attention_bias says.
    settings = _qwen_settings({**config, "attention_bias": False}, where, own_output)
    return {**settings, "add_qkv_bias": True}


def qwen3_settings(config: Mapping[str, Any], where: Path, own_output: bool) -> dict[str, Any]:
    refuse_others(config, where, {"attention_bias": (False,)})
    settings = _qwen_settings({"head_dim": 128, **config, "attention_bias": False}, where, own_output)
    return {**settings, "qk_layernorm": True}


def qwen2_config(run: Run, vocab_size: int) -> dict[str, Any]:
    llama = llama_config(run, vocab_size)
    del llama["attention_bias"], llama["mlp_bias"]
    return {
        **llama,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
    }


def qwen3_config(run: Run, vocab_size: int) -> dict[str, Any]:
    return {
        **qwen2_config(run, vocab_size),
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
    }

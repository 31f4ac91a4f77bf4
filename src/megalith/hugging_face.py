"""The kinds of models that Hugging Face's library has too, a row for each: config.json and the names of weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalith.config import Run, flag_of, known_settings
from megalith.hugging_face_config import LONGEST_AT_FIRST, count, number, refuse_others
from megalith.hugging_face_llama import (
    llama_config,
    llama_names,
    llama_settings,
    qwen2_config,
    qwen2_settings,
    qwen3_config,
    qwen3_settings,
)
from megalith.hugging_face_weights import Names
from megalith.models.shape import shape_of

# Places of an encoder and a decoder; what T5s are usually trained with.
ENCODER_LENGTH, DECODER_LENGTH = 512, 128


@dataclass(frozen=True)
class Kind:
    """A kind of model. Functions raise ValueError for what ours cannot be."""

    task: str
    names: Callable[[Run], Names]
    # The settings of a run, from config.json, where it lies and whether there is a second table.
    settings: Callable[[Mapping[str, Any], Path, bool], dict[str, Any]]
    # config.json of a run with so many tokens; None: theirs are not written.
    config: Callable[[Run, int], dict[str, Any]] | None = None
    # Settings that a run of this kind has.
    needs: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    # Tokens without which it cannot be trained.
    roles: tuple[str, ...] = ()


def kind_of(run: Run, where: str) -> str:
    """The kind that a run's model is, by its name. Raises ValueError, saying what stands in the way, if it is none."""
    known = [name for name, kind in KINDS.items() if kind.config is not None and kind.task == run.task]
    if not known:
        raise ValueError(f"{where}: holds a {run.task} model; only a gpt can be converted.")
    faults = []
    for name in known:
        kind, told = KINDS[name], dict[str, list[str]]()
        for key, fit in kind.needs.items():
            if (value := getattr(run.model, key)) not in fit:
                is_missing = isinstance(value, bool) and value == known_settings()[key].field.default
                flag = flag_of(key) if isinstance(value, bool) else f"{flag_of(key)} = {value}"
                told.setdefault("without" if is_missing else "with", []).append(flag)
        shape = shape_of(run.model)
        if name == "gpt2" and shape.num_heads * shape.head_width != shape.width:
            told.setdefault("with", []).append(f"{flag_of('kv_channels')} = {shape.head_width}")
        if not told:
            return name
        faults.append(f"a {name} is none " + " and ".join(f"{how} {', '.join(flags)}" for how, flags in told.items()))
    raise ValueError(f"{where}: Hugging Face has no such model: {'; '.join(faults)}.")


def _gpt2_names(run: Run) -> Names:
    return Names(
        whole={
            "word_embedding": "transformer.wte",
            "position_embedding": "transformer.wpe",
            "final_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        blocks={"layers": "transformer.h.{}."},
        in_block={
            "attention_norm": ("ln_1",),
            "attention.qkv": ("attn.c_attn",),
            "attention.out": ("attn.c_proj",),
            "feedforward_norm": ("ln_2",),
            "feedforward.up": ("mlp.c_fc",),
            "feedforward.down": ("mlp.c_proj",),
        },
        stacked=("attention.qkv",),
        turns=True,
        prefix="transformer.",
    )


# What they call what stands inside a feed-forward, and what it is here; the first of equal ones is written.
GPT2_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "gelu_new": {"activation_function": "gelu", "bias_gelu_fusion": True},
    "gelu_pytorch_tanh": {"activation_function": "gelu", "bias_gelu_fusion": True},
    "gelu": {"activation_function": "gelu", "bias_gelu_fusion": False},
    "relu": {"activation_function": "relu"},
}


def _gpt2_settings(config: Mapping[str, Any], where: Path, own_output: bool) -> dict[str, Any]:
    fits: dict[str, tuple[object, ...]] = {
        "activation_function": tuple(GPT2_ACTIVATIONS),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "is_causal": (True,),
    }
    refuse_others(config, where, fits)
    of_table, of_branches = (number(config, name, where, default=0.1) for name in ("embd_pdrop", "resid_pdrop"))
    if of_table != of_branches:
        raise ValueError(
            f"{where}: embd_pdrop is {of_table} and resid_pdrop {of_branches}, which are one here, --hidden-dropout; "
            "make them equal"
        )
    width, places = count(config, "n_embd", where), count(config, "n_positions", where)
    return {
        "num_layers": count(config, "n_layer", where),
        "hidden_size": width,
        "num_attention_heads": count(config, "n_head", where),
        "ffn_hidden_size": count(config, "n_inner", where, default=4 * width),
        "max_position_embeddings": places,
        "seq_length": min(places, LONGEST_AT_FIRST),
        "layernorm_epsilon": number(config, "layer_norm_epsilon", where, default=1e-5),
        "attention_dropout": number(config, "attn_pdrop", where, default=0.1),
        "hidden_dropout": of_branches,
        "init_method_std": number(config, "initializer_range", where, default=0.02),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", True),
        **GPT2_ACTIVATIONS[config.get("activation_function", "gelu_new")],
    }


def _gpt2_config(run: Run, vocab_size: int) -> dict[str, Any]:
    shape, model = shape_of(run.model), run.model
    form = "gelu_new" if model.bias_gelu_fusion or model.openai_gelu else "gelu"
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_layer": shape.num_layers,
        "n_embd": shape.width,
        "n_head": shape.num_heads,
        "n_inner": shape.inner,
        "n_positions": shape.num_positions,
        "activation_function": "relu" if model.activation_function == "relu" else form,
        "layer_norm_epsilon": model.layernorm_epsilon,
        "attn_pdrop": model.attention_dropout,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
    }


def _t5_names(run: Run) -> Names:
    up = "wi" if run.model.activation_function == "relu" else "wi_1"
    return Names(
        whole={
            "word_embedding": "shared",
            "output": "lm_head",
            "encoder_norm": "encoder.final_layer_norm",
            "final_norm": "decoder.final_layer_norm",
            "encoder_positions": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
            "decoder_positions": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        },
        blocks={stack: f"{stack}.block.{{}}.layer." for stack in ("encoder", "decoder")},
        in_block={
            "attention_norm": ("0.layer_norm",),
            "attention.qkv": ("0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v"),
            "attention.out": ("0.SelfAttention.o",),
            "cross_norm": ("1.layer_norm",),
            "cross.query": ("1.EncDecAttention.q",),
            "cross.key_value": ("1.EncDecAttention.k", "1.EncDecAttention.v"),
            "cross.out": ("1.EncDecAttention.o",),
            "feedforward_norm": ("{last}.layer_norm",),
            "feedforward.up": ("{last}.DenseReluDense." + up,),
            "feedforward.gate": ("{last}.DenseReluDense.wi_0",),
            "feedforward.down": ("{last}.DenseReluDense.wo",),
        },
        last={"encoder": "1", "decoder": "2"},
    )


def _t5_settings(config: Mapping[str, Any], where: Path, own_output: bool) -> dict[str, Any]:
    activation, layers = config.get("feed_forward_proj", "relu"), count(config, "num_layers", where)
    if activation not in ("relu", "gated-gelu"):
        raise ValueError(f"{where}: feed_forward_proj is {activation!r:.60}; relu and gated-gelu are known")
    if (config.get("num_decoder_layers") or layers) != layers:
        raise ValueError(f"{where}: num_decoder_layers differs from num_layers = {layers}; stacks must be equal here")
    inside = "relu" if activation == "relu" else "gelu_new"
    fits: dict[str, tuple[object, ...]] = {
        "dense_act_fn": (inside,),
        "is_gated_act": (activation != "relu",),
        "is_encoder_decoder": (True,),
    }
    refuse_others(config, where, fits)
    dropout = number(config, "dropout_rate", where, default=0.1)
    return {
        "num_layers": layers,
        "hidden_size": count(config, "d_model", where),
        "num_attention_heads": count(config, "num_heads", where),
        "kv_channels": count(config, "d_kv", where),
        "ffn_hidden_size": count(config, "d_ff", where),
        "max_position_embeddings": ENCODER_LENGTH,
        "encoder_seq_length": ENCODER_LENGTH,
        "decoder_seq_length": DECODER_LENGTH,
        "layernorm_epsilon": number(config, "layer_norm_epsilon", where, default=1e-6),
        "attention_dropout": dropout,
        "hidden_dropout": dropout,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "output_bias": False,
        "activation_function": activation,
        "softmax_scale": 1.0,
        "apply_query_key_layer_scaling": False,
        "position_embedding_type": "relative",
        "relative_attention_num_buckets": count(config, "relative_attention_num_buckets", where),
        "relative_attention_max_distance": count(config, "relative_attention_max_distance", where, default=128),
        # Files of older versions of the library say it by what is tied.
        "scale_decoder_outputs": config.get("scale_decoder_outputs", config.get("tie_word_embeddings")) is not False,
        "untie_embeddings_and_output_weights": own_output,
    }


PLAIN: tuple[object, ...] = (False,)
OF_LLAMAS: dict[str, tuple[object, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "apply_residual_connection_post_layernorm": PLAIN,
}
KINDS: dict[str, Kind] = {
    "gpt2": Kind(
        "gpt",
        _gpt2_names,
        _gpt2_settings,
        _gpt2_config,
        needs={
            "normalization": ("LayerNorm",),
            "add_bias_linear": (True,),
            "qk_layernorm": PLAIN,
            "activation_function": ("gelu", "relu"),
            "swiglu": PLAIN,
            "position_embedding_type": ("learned_absolute",),
            "group_query_attention": PLAIN,
            "apply_residual_connection_post_layernorm": PLAIN,
        },
    ),
    "llama": Kind(
        "gpt",
        llama_names,
        llama_settings,
        llama_config,
        needs={**OF_LLAMAS, "add_qkv_bias": PLAIN, "qk_layernorm": PLAIN},
    ),
    "qwen2": Kind(
        "gpt",
        llama_names,
        qwen2_settings,
        qwen2_config,
        needs={**OF_LLAMAS, "add_bias_linear": PLAIN, "add_qkv_bias": (True,), "qk_layernorm": PLAIN},
    ),
    "qwen3": Kind(
        "gpt",
        llama_names,
        qwen3_settings,
        qwen3_config,
        needs={**OF_LLAMAS, "add_bias_linear": PLAIN, "add_qkv_bias": PLAIN, "qk_layernorm": (True,)},
    ),
    "t5": Kind("t5", _t5_names, _t5_settings, roles=("pad", "eos")),
}

"""The kinds of models that Hugging Face's library has too, a row for each: config.json and the names of weights.

Weights of ours stand together where theirs are apart, group of heads by group, and the other way round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalith.config import Run, flag_of, known_settings
from megalith.hugging_face_config import count, number, refuse_others
from megalith.layers.rotary import FEW_TURNS, FIRST_LENGTH, MANY_TURNS
from megalith.models.shape import key_heads, shape_of

# Places of an encoder and a decoder; what T5s are usually trained with.
ENCODER_LENGTH, DECODER_LENGTH = 512, 128
LONGEST_AT_FIRST = 4096  # tokens of a sequence, unless the command line says otherwise


@dataclass(frozen=True)
class Names:
    """What a kind calls weights, by our names without .weight or .bias.

    in_block: of those of a block, to be put behind what stands in blocks for its stack; several are parts that ours
    joins. {last}: what last has for the stack. stacked: of these all parts lie one behind the other in one tensor.
    """

    whole: Mapping[str, str]
    blocks: Mapping[str, str]
    in_block: Mapping[str, tuple[str, ...]]
    last: Mapping[str, str] = field(default_factory=dict)
    stacked: tuple[str, ...] = ()
    turns: bool = False  # matrices of blocks are [inputs, outputs]
    prefix: str = ""  # what files of the model without its head leave out


@dataclass(frozen=True)
class Stored:
    """How their files hold one weight of ours: the names of its tensors, and how these become it."""

    names: tuple[str, ...]
    shares: tuple[int, ...]  # heads of a group in each part; empty: there are no parts
    groups: int
    is_stacked: bool
    is_turned: bool


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


def stored(names: Names, run: Run, name: str) -> Stored:
    """How the files hold a weight of ours, by its name."""
    module, _, what = name.rpartition(".")
    groups, heads = key_heads(run.model), shape_of(run.model).num_heads
    if module in names.whole:
        return Stored((f"{names.whole[module]}.{what}",), (), groups, False, False)
    stack, number, inside = module.split(".", 2)
    parts = [part.format(last=names.last.get(stack, "")) for part in names.in_block[inside]]
    is_stacked = inside in names.stacked
    shares = (heads // groups, 1, 1) if is_stacked or len(parts) == 3 else (1,) * len(parts) if len(parts) > 1 else ()
    base = names.blocks[stack].format(number)
    return Stored(tuple(f"{base}{part}.{what}" for part in parts), shares, groups, is_stacked, names.turns)


def made_ours(found: Sequence[Tensor], how: Stored) -> Tensor:
    """A weight of ours of the tensors that hold it. Raises ValueError if heads cannot share their rows."""
    tensors = [tensor.t() if how.is_turned and tensor.dim() == 2 else tensor for tensor in found]
    if not how.shares:
        return tensors[0]
    if how.is_stacked:
        unit, left = divmod(tensors[0].shape[0], sum(how.shares))
        tensors = [] if left else [*tensors[0].split([share * unit for share in how.shares])]
    if not tensors or any(tensor.shape[0] % how.groups for tensor in tensors):
        raise ValueError(f"{how.names[0]} has {found[0].shape[0]} rows, which its heads cannot share")
    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        raise ValueError(f"{' and '.join(how.names)} have rows of different lengths")
    return torch.cat([tensor.unflatten(0, (how.groups, -1)) for tensor in tensors], 1).flatten(0, 1)


def made_theirs(weight: Tensor, how: Stored) -> dict[str, Tensor]:
    """The tensors of their files, by name, that hold a weight of ours."""
    parts = [weight]
    if how.shares:
        grouped = weight.unflatten(0, (how.groups, -1))
        unit = grouped.shape[1] // sum(how.shares)
        parts = [part.flatten(0, 1) for part in grouped.split([share * unit for share in how.shares], 1)]
    if how.is_stacked:
        parts = [torch.cat(parts)]
    turned = [part.t() if how.is_turned and part.dim() == 2 else part for part in parts]
    return dict(zip(how.names, turned, strict=True))


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


def _llama_names(run: Run) -> Names:
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


def _llama_settings(config: Mapping[str, Any], where: Path, own_output: bool) -> dict[str, Any]:
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


def _llama_config(run: Run, vocab_size: int) -> dict[str, Any]:
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
    return _llama_settings({**QWENS_USUAL, **config, "mlp_bias": False}, where, own_output)


def _qwen2_settings(config: Mapping[str, Any], where: Path, own_output: bool) -> dict[str, Any]:
    # Its biases are those of queries, keys and values, whatever attention_bias says.
    settings = _qwen_settings({**config, "attention_bias": False}, where, own_output)
    return {**settings, "add_qkv_bias": True}


def _qwen3_settings(config: Mapping[str, Any], where: Path, own_output: bool) -> dict[str, Any]:
    refuse_others(config, where, {"attention_bias": (False,)})
    settings = _qwen_settings({"head_dim": 128, **config, "attention_bias": False}, where, own_output)
    return {**settings, "qk_layernorm": True}


def _qwen2_config(run: Run, vocab_size: int) -> dict[str, Any]:
    llama = _llama_config(run, vocab_size)
    del llama["attention_bias"], llama["mlp_bias"]
    return {
        **llama,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
    }


def _qwen3_config(run: Run, vocab_size: int) -> dict[str, Any]:
    return {
        **_qwen2_config(run, vocab_size),
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
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
        _llama_names,
        _llama_settings,
        _llama_config,
        needs={**OF_LLAMAS, "add_qkv_bias": PLAIN, "qk_layernorm": PLAIN},
    ),
    "qwen2": Kind(
        "gpt",
        _llama_names,
        _qwen2_settings,
        _qwen2_config,
        needs={**OF_LLAMAS, "add_bias_linear": PLAIN, "add_qkv_bias": (True,), "qk_layernorm": PLAIN},
    ),
    "qwen3": Kind(
        "gpt",
        _llama_names,
        _qwen3_settings,
        _qwen3_config,
        needs={**OF_LLAMAS, "add_bias_linear": PLAIN, "add_qkv_bias": PLAIN, "qk_layernorm": (True,)},
    ),
    "t5": Kind("t5", _t5_names, _t5_settings, roles=("pad", "eos")),
}

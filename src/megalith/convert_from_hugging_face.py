"""A T5 of Hugging Face (config.json, model.safetensors, tokenizer.json) as a run directory of ours, to go on from."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalith import __version__
from megalith.checkpoint.directory import list_checkpoints
from megalith.checkpoint.pieces import TORCH_DTYPES, Place, whole
from megalith.checkpoint.shards import ShardReader, open_shard, read_file
from megalith.checkpoint.store import save
from megalith.config import Run, compose
from megalith.convert_from_megatron import open_tokenizer, padded_to
from megalith.data.tokenizer import Tokenizer
from megalith.files import DISK, make_directories
from megalith.models.shape import shape_of
from megalith.models.t5 import T5
from megalith.monitor.interval import Interval
from megalith.monitor.ledger import Ledger
from megalith.sources import as_toml, write_run_file
from megalith.tasks.t5 import identity

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
LARGEST_JSON = 16 << 20  # bytes
ENCODER_LENGTH, DECODER_LENGTH = 512, 128  # tokens; what T5s are usually trained with
ACTIVATIONS = ("relu", "gated-gelu")


def from_hugging_face(directory: str, run_dir: str, *, tokenizer_settings: Mapping[str, str]) -> Iterator[str]:
    """Make a run directory of a T5's directory, and say what was done.

    Raises ValueError, naming file and entry, for what is missing, damaged or no T5; nothing is written then.
    """
    if list_checkpoints(run_dir):
        raise ValueError(f"--to = {run_dir}: holds checkpoints already. Choose another directory.")
    folder = Path(directory)
    config = read_json(folder / CONFIG)
    with ExitStack() as stack:
        files = [stack.enter_context(open_shard(path, disk=DISK)) for path in weight_files(folder)]
        theirs = {name: file for file in files for name in file.names}
        yield f"reading {folder}"
        run = run_of(config, folder, run_dir, tokenizer_settings, own_output="lm_head.weight" in theirs)
        tokenizer = open_tokenizer(run)
        weights = Weights(folder, theirs, num_heads=shape_of(run.model).num_heads)
        vocab_size = weights.read("shared.weight").shape[0]
        run = padded_to(run, tokenizer.vocab_size, vocab_size)
        model = T5(run.model, vocab_size, device="meta")
        tensors = {}
        for name, parameter in model.named_parameters():
            tensors[f"weight.{name}"] = found = weights.of_ours(name)
            if found.shape != parameter.shape:
                shapes = f"{tuple(found.shape)}, {CONFIG} wants {tuple(parameter.shape)}"
                raise ValueError(f"{folder}: the weights for {name} are {shapes}")
    make_directories(run_dir)
    tokenizer.save(Path(run_dir) / "tokenizer")
    write_run_file(run)
    pieces = {name: whole(tensor) for name, tensor in tensors.items()}
    state, notes = state_for(run, tokenizer, vocab_size), notes_for(run, folder)
    yield f"wrote {save(run_dir, 0, pieces, state, notes=notes)}"
    yield f"go on with: megalith pretrain {run_dir}/run.toml --save OTHER_DIR --load {run_dir} --finetune ..."


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; ValueError, naming it, if there is none."""
    try:
        content = json.loads(read_file(path, LARGEST_JSON, disk=DISK))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({error!s:.100})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The file of the weights, or those that an index lists."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    listed = read_json(folder / INDEX).get("weight_map")
    names = sorted(set(listed.values())) if isinstance(listed, dict) else []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{folder / INDEX}: names a file {name!r:.100}, which is none of the directory's")
    return [folder / name for name in names]


def run_of(
    config: Mapping[str, Any],
    folder: Path,
    run_dir: str,
    tokenizer_settings: Mapping[str, str],
    *,
    own_output: bool,
) -> Run:
    """The run that a config.json describes, saving into the run directory. own_output: the weights hold a second table.

    Raises ValueError for what is no T5, or one of a kind that is not known here.
    """
    where = folder / CONFIG
    if config.get("model_type") != "t5":
        raise ValueError(f"{where}: model_type is {config.get('model_type')!r:.60}; only a t5 can be converted")
    activation, layers = config.get("feed_forward_proj", "relu"), _count(config, "num_layers", where)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{where}: feed_forward_proj is {activation!r:.60}; {' and '.join(ACTIVATIONS)} are known")
    if (config.get("num_decoder_layers") or layers) != layers:
        raise ValueError(f"{where}: num_decoder_layers differs from num_layers = {layers}; stacks must be equal here")
    kind = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder / TOKENIZER)}
    dropout = float(config.get("dropout_rate", 0.1))
    values: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": _count(config, "d_model", where),
        "num_attention_heads": _count(config, "num_heads", where),
        "kv_channels": _count(config, "d_kv", where),
        "ffn_hidden_size": _count(config, "d_ff", where),
        "max_position_embeddings": ENCODER_LENGTH,
        "encoder_seq_length": ENCODER_LENGTH,
        "decoder_seq_length": DECODER_LENGTH,
        "layernorm_epsilon": float(config.get("layer_norm_epsilon", 1e-6)),
        "attention_dropout": dropout,
        "hidden_dropout": dropout,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "output_bias": False,
        "activation_function": activation,
        "softmax_scale": 1.0,
        "apply_query_key_layer_scaling": False,
        "position_embedding_type": "relative",
        "relative_attention_num_buckets": _count(config, "relative_attention_num_buckets", where),
        "relative_attention_max_distance": config.get("relative_attention_max_distance", 128),
        # Files of older versions of the library say it by what is tied.
        "scale_decoder_outputs": bool(config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))),
        "untie_embeddings_and_output_weights": own_output,
    }
    return compose("t5", {**values, **(tokenizer_settings or kind), "save": run_dir})


def _count(config: Mapping[str, Any], name: str, where: Path) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{where}: {name} is {value!r:.60}; it must be a number of 1 or more")
    return value


# Our names of weights that stand in no block.
WHOLE = {
    "word_embedding.weight": "shared.weight",
    "output.weight": "lm_head.weight",
    "encoder_norm.weight": "encoder.final_layer_norm.weight",
    "final_norm.weight": "decoder.final_layer_norm.weight",
    "encoder_positions.weight": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "decoder_positions.weight": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
}
# Those of a block; several are joined, head by head. LAST is the number of the feed-forward among a block's layers.
IN_BLOCK = {
    "attention_norm.weight": ("0.layer_norm",),
    "attention.qkv.weight": ("0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v"),
    "attention.out.weight": ("0.SelfAttention.o",),
    "cross_norm.weight": ("1.layer_norm",),
    "cross.query.weight": ("1.EncDecAttention.q",),
    "cross.key_value.weight": ("1.EncDecAttention.k", "1.EncDecAttention.v"),
    "cross.out.weight": ("1.EncDecAttention.o",),
    "feedforward_norm.weight": ("LAST.layer_norm",),
    "feedforward.up.weight": ("LAST.DenseReluDense.wi_1",),
    "feedforward.gate.weight": ("LAST.DenseReluDense.wi_0",),
    "feedforward.down.weight": ("LAST.DenseReluDense.wo",),
}
LAST = {"encoder": "1", "decoder": "2"}


class Weights:
    """The weights of a T5 of Hugging Face, by our names."""

    def __init__(self, folder: Path, theirs: Mapping[str, ShardReader], *, num_heads: int) -> None:
        self._folder = folder
        self._theirs = theirs
        self._num_heads = num_heads

    def of_ours(self, name: str) -> Tensor:
        """fp32: a weight of ours. Raises ValueError for one that the files do not hold."""
        if name in WHOLE:
            return self.read(WHOLE[name])
        stack, number, rest = name.split(".", 2)
        base = f"{stack}.block.{number}.layer."
        parts = [f"{base}{part.replace('LAST', LAST[stack])}.weight" for part in IN_BLOCK[rest]]
        if rest == "feedforward.up.weight" and parts[0] not in self._theirs:
            parts = [parts[0].replace("wi_1", "wi")]
        read = [self.read(part) for part in parts]
        if len(read) == 1:
            return read[0]
        if any(part.shape[0] % self._num_heads for part in read):
            raise ValueError(f"{self._folder}: {parts[0]} has {read[0].shape[0]} rows, which its heads cannot share")
        return torch.stack([part.unflatten(0, (self._num_heads, -1)) for part in read], 1).flatten(0, 2)

    def read(self, name: str) -> Tensor:
        """fp32: a weight of theirs."""
        file = self._theirs.get(name)
        kind = None if file is None else file.kind(name)
        if file is None or kind is None:
            raise ValueError(f"{self._folder}: its weights lack {name}")
        dtype, shape = kind
        tensor = torch.empty(shape, dtype=TORCH_DTYPES[dtype])
        file.fill(name, Place((0,) * len(shape), shape), tensor)
        return tensor.float()


def state_for(run: Run, tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Everything but tensors that a run of ours goes on from (see run_state.py): it has not begun."""
    shape = shape_of(run.model)
    return {
        "step": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "schedule_samples": 0,
        "skipped_steps": 0,
        "num_updates": 0,
        "loss_scale": None,
        "schedule": {},
        "model": {
            "task": run.task,
            "num_layers": shape.num_layers,
            "hidden_size": shape.width,
            "num_attention_heads": shape.num_heads,
            "kv_channels": shape.head_width,
            "max_position_embeddings": shape.num_positions,
            "padded_vocab_size": vocab_size,
            "tokenizer": tokenizer.digest,
            **identity(run),
        },
    }


def notes_for(run: Run, folder: Path) -> dict[str, Any]:
    """What a checkpoint of ours keeps besides: nothing measured yet, and where this one comes from."""
    return {
        "interval": Interval(0.0, last_step=0, num_devices=1, peak_flops=None).state(0.0),
        "ledger": Ledger(clock=lambda: 0, calendar=time.time_ns).state(ended=True),
        "run": as_toml(run),
        "megalith": __version__,
        "converted_from": str(folder),
    }

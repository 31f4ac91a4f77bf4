"""A model of Hugging Face (config.json, model.safetensors, its tokenizer) as a run directory of ours, to go on from."""

import json
import math
import os
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
from megalith.convert_from_megatron import padded_to, required_tokenizer
from megalith.data.tokenizer import Tokenizer
from megalith.derived import num_layers
from megalith.files import DISK, make_directories
from megalith.hugging_face import KINDS
from megalith.hugging_face_config import refuse_others
from megalith.hugging_face_weights import Names, made_ours, stored
from megalith.models.shape import shape_of
from megalith.monitor.interval import Interval
from megalith.monitor.ledger import Ledger
from megalith.sources import as_toml, write_run_file
from megalith.task_rows import TASK_ROWS

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OUTPUT = "lm_head.weight"  # the second table, where there is one
TABLE_OF_T5 = "shared.weight"
# Ends of the names of tensors that other weights or config.json make.
MADE_ANEW = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", "embed_tokens.weight", OUTPUT)
LARGEST_JSON = 16 << 20  # bytes
ADDED = "added_tokens.json"  # tokens and ids beyond vocab.json or tokenizer.model
# Files of a tokenizer, the first that are there, and the settings that name them.
TOKENIZERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("HuggingFaceTokenizer", {"tokenizer_model": "tokenizer.json"}),
    ("GPT2BPETokenizer", {"vocab_file": "vocab.json", "merge_file": "merges.txt"}),
    ("SentencePieceTokenizer", {"tokenizer_model": "tokenizer.model"}),
)


def from_hugging_face(directory: str, run_dir: str, *, tokenizer_settings: Mapping[str, str]) -> Iterator[str]:
    """Make a run directory of a model's directory, and say what was done.

    Raises ValueError, naming file and entry, for what is missing, damaged or of no kind known here; nothing is written
    then.
    """
    if list_checkpoints(run_dir):
        raise ValueError(f"--to = {run_dir}: holds checkpoints already. Choose another directory.")
    folder = Path(directory)
    config = read_json(folder / CONFIG)
    with ExitStack() as stack:
        files = [stack.enter_context(open_shard(followed(path), disk=DISK)) for path in weight_files(folder)]
        theirs = {name: file for file in files for name in file.names}
        yield f"reading {folder}"
        own_output = OUTPUT in theirs and not _is_copy_of_table(theirs, config)
        run = run_of(config, folder, run_dir, tokenizer_settings, own_output=own_output)
        tokenizer = required_tokenizer(run)
        kind = KINDS[str(config["model_type"])]
        if missing := [role for role in kind.roles if role not in tokenizer.roles]:
            wanted = ", ".join(f"{role}_token" for role in missing)
            raise ValueError(f"{folder}: a {kind.task} needs {wanted}, which tokenizer_config.json names. Put it there")
        if kind.task == "t5":
            _refuse_another_start(config, folder, tokenizer)
        weights = Weights(folder, theirs, kind.names(run), run)
        table = weights.of_ours("word_embedding.weight")
        vocab_size = table.shape[0]
        # Versions of their library from 5 on use such an output, older ones the table.
        is_tied = not run.model.untie_embeddings_and_output_weights
        if is_tied and OUTPUT in theirs and not torch.equal(weights.read(OUTPUT), table):
            raise ValueError(
                f"{folder}: {OUTPUT} differs from the table of tokens, which {CONFIG} ties it to. Set "
                f"tie_word_embeddings to false there, or leave {OUTPUT} out of the weights"
            )
        if num_layers(run) > len(theirs):
            raise ValueError(f"{folder}: {len(theirs)} tensors are none of {num_layers(run)} layers, as {CONFIG} wants")
        run = padded_to(run, tokenizer.vocab_size, vocab_size)
        task = TASK_ROWS[run.task]
        build = task.build_part(run, vocab_size, torch.float32)
        model = build(layers=range(num_layers(run)), first=True, last=True)
        tensors = {}
        for name, parameter in model.named_parameters():
            tensors[f"weight.{name}"] = found = weights.of_ours(name)
            if found.shape != parameter.shape:
                shapes = f"{tuple(found.shape)}, {CONFIG} wants {tuple(parameter.shape)}"
                raise ValueError(f"{folder}: the weights for {name} are {shapes}")
        if left := [name for name in sorted(theirs.keys() - weights.taken) if not name.endswith(MADE_ANEW)]:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            yield f"warning: left out {left[0]}{more}, for which a {config['model_type']} has no place"
    make_directories(run_dir)
    tokenizer.save(Path(run_dir) / "tokenizer")
    write_run_file(run)
    pieces = {name: whole(tensor) for name, tensor in tensors.items()}
    state, notes = state_for(run, tokenizer, vocab_size), notes_for(run, folder)
    yield f"wrote {save(run_dir, 0, pieces, state, notes=notes)}"
    yield f"go on with: megalith pretrain {run_dir}/run.toml --save OTHER_DIR --load {run_dir} --finetune ..."


def _is_copy_of_table(theirs: Mapping[str, ShardReader], config: Mapping[str, Any]) -> bool:
    """Whether the output of a T5 is stored although it is the table, tied to it unless the config denies that."""
    if TABLE_OF_T5 not in theirs or config.get("tie_word_embeddings") is False:
        return False
    return torch.equal(read_whole(theirs, OUTPUT), read_whole(theirs, TABLE_OF_T5))


def _refuse_another_start(config: Mapping[str, Any], folder: Path, tokenizer: Tokenizer) -> None:
    """Raise ValueError if a decoder begins with another token than the one that it would be trained with here."""
    wanted, start = config.get("decoder_start_token_id"), tokenizer.roles.get("bos", tokenizer.pad)
    if wanted not in (None, start):
        raise ValueError(
            f"{folder}: decoder_start_token_id is {wanted!r:.60} in {CONFIG}, and a t5 begins with {start}, the "
            "bos_token of tokenizer_config.json, or its pad_token where there is none. Make them agree"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; ValueError, naming it, if there is none."""
    text = read_file(followed(path), LARGEST_JSON, disk=DISK)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({error!s:.100})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return content


def followed(path: Path) -> Path:
    """Where a file lies: the hub's cache has links in a model's directory, to files that its versions share."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def weight_files(folder: Path) -> list[Path]:
    """The file of the weights, or those that an index lists."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict):
        raise ValueError(f"{folder / INDEX}: weight_map is {listed!r:.60}; it must be an object of tensors and files")
    for name in listed.values():
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
            raise ValueError(f"{folder / INDEX}: names a file {name!r:.100}, which is none of the directory's")
    return [folder / name for name in sorted(set(listed.values()))]


def run_of(
    config: Mapping[str, Any],
    folder: Path,
    run_dir: str,
    tokenizer_settings: Mapping[str, str],
    *,
    own_output: bool,
) -> Run:
    """The run that a config.json describes, saving into the run directory. own_output: the weights hold a second table.

    Raises ValueError for a kind of model that is not known here, or one with what ours has not.
    """
    where = folder / CONFIG
    kind = KINDS.get(str(config.get("model_type")))
    if kind is None:
        known = ", ".join(KINDS)
        raise ValueError(f"{where}: model_type is {config.get('model_type')!r:.60}; of {known} one can be converted")
    refuse_others(config, where, {"quantization_config": (None,)})
    values = kind.settings(config, where, own_output)
    return compose(kind.task, {**values, **(tokenizer_settings or tokenizer_in(folder)), "save": run_dir})


def tokenizer_in(folder: Path) -> dict[str, str]:
    """The settings that name the tokenizer of a directory; its tokenizer.json where none is there.

    Raises ValueError if tokens were added that only a tokenizer.json would hold.
    """
    there = [row for row in TOKENIZERS if all((folder / name).exists() for name in row[1].values())]
    kind, files = (there or TOKENIZERS)[0]
    if kind != TOKENIZERS[0][0] and (folder / ADDED).exists():
        vocabulary = read_json(folder / files["vocab_file"]) if "vocab_file" in files else {}
        if beyond := [token for token in read_json(folder / ADDED) if token not in vocabulary]:
            raise ValueError(
                f"{folder / ADDED}: a {kind} has no place for {beyond[0]!r:.60}. Have the tokenizer saved with a "
                "tokenizer.json, which holds them all, or name its files with --tokenizer-type and their flags"
            )
    return {"tokenizer_type": kind, **{setting: str(folder / name) for setting, name in files.items()}}


class Weights:
    """The weights of a model of Hugging Face, by our names."""

    def __init__(self, folder: Path, theirs: Mapping[str, ShardReader], names: Names, run: Run) -> None:
        self._folder = folder
        self._theirs = theirs
        self._names, self._run = names, run
        self.taken: set[str] = set()  # names of theirs
        # A model without its head is stored without the prefix.
        self._prefix = "" if any(name.startswith(names.prefix) for name in theirs) else names.prefix

    def of_ours(self, name: str) -> Tensor:
        """fp32: a weight of ours. Raises ValueError for one that the files do not hold."""
        how = stored(self._names, self._run, name)
        try:
            return made_ours([self.read(part.removeprefix(self._prefix)) for part in how.names], how)
        except ValueError as error:
            raise ValueError(f"{self._folder}: {error}") from error

    def read(self, name: str) -> Tensor:
        """fp32: a weight of theirs."""
        weight = read_whole(self._theirs, name)
        self.taken.add(name)
        return weight


def read_whole(theirs: Mapping[str, ShardReader], name: str) -> Tensor:
    """fp32: a weight of theirs. Raises ValueError for one that the files do not hold."""
    file = theirs.get(name)
    kind = None if file is None else file.kind(name)
    if file is None or kind is None:
        raise ValueError(f"its weights lack {name}")
    dtype, shape = kind
    if not math.prod(shape) or not shape:
        raise ValueError(f"{name} has the shape {shape}, which no weight has")
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
            "ffn_hidden_size": shape.inner,
            "untie_embeddings_and_output_weights": run.model.untie_embeddings_and_output_weights,
            "max_position_embeddings": shape.num_positions,
            "padded_vocab_size": vocab_size,
            "tokenizer": tokenizer.digest,
            **TASK_ROWS[run.task].identity(run),
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

"""The newest checkpoint of a GPT's run directory as a directory that Hugging Face's library loads."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megalith.checkpoint.shards import write_shard
from megalith.config import Run
from megalith.convert_from_hugging_face import CONFIG, INDEX, WEIGHTS
from megalith.data.tokenizer import Tokenizer
from megalith.files import DISK, make_directories, write_whole
from megalith.hugging_face import KINDS, kind_of
from megalith.hugging_face_weights import made_theirs, stored
from megalith.run_state import WEIGHT
from megalith.trained import load_tensors, refuse_another_tokenizer, run_of, tokenizer_of

LARGEST_FILE = 5 * 10**9  # bytes, as Hugging Face's own files
TABLES = ("word_embedding.weight", "output.weight")
# The tokenizers that Hugging Face has too, and the class that reads their files.
TOKENIZER_CLASSES = {"GPT2BPETokenizer": "GPT2Tokenizer", "HuggingFaceTokenizer": "PreTrainedTokenizerFast"}


def to_hugging_face(
    run_dir: str, directory: str, *, step: int | None, largest_file: int = LARGEST_FILE
) -> Iterator[str]:
    """Write a checkpoint's model as config.json, safetensors in fp32 and tokenizer, and say what was done.

    step: which checkpoint; None for the newest that verifies. largest_file: bytes; a larger model is several files with
    an index. Rows that only pad the table are left out. config.json is written last. Memory: the weights, twice.

    Raises ValueError if there is no checkpoint, or Hugging Face has no such model; nothing is written then.
    """
    run = run_of(run_dir)
    kind = kind_of(run, run_dir)
    folder = Path(directory)
    if (folder / CONFIG).exists() or (folder / WEIGHTS).exists():
        raise ValueError(f"{folder}: holds a model already. Choose another directory.")
    tensors, loaded = load_tensors(run_dir, step=step, wanted=lambda name: name.startswith(WEIGHT))
    yield from (f"warning: {message}" for message in loaded.messages(goes_on=False))
    tokenizer = tokenizer_of(run_dir, run)
    refuse_another_tokenizer(run_dir, loaded.index, tokenizer)
    theirs = renamed(run, kind, tensors, tokenizer.vocab_size)
    make_directories(folder)
    yield from write_weights(folder, theirs, largest_file)
    told, named = write_tokenizer(folder, tokenizer)
    yield from told
    _write_json(folder / "generation_config.json", named)
    config = KINDS[kind].config
    assert config is not None, "kind_of saw to it"
    _write_json(folder / CONFIG, {**config(run, tokenizer.vocab_size), **named, "torch_dtype": "float32"})
    yield f"wrote {folder}, a {kind} of step {loaded.index.step}"


def renamed(run: Run, kind: str, tensors: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """The tensors of their files, by name, in the order of the model."""
    names = KINDS[kind].names(run)
    theirs: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        ours = name.removeprefix(WEIGHT)
        theirs |= made_theirs(weight[:vocab_size] if ours in TABLES else weight, stored(names, run, ours))
    return theirs


def write_weights(folder: Path, tensors: Mapping[str, Tensor], largest: int) -> Iterator[str]:
    """One file, or several and an index, each of at most that many bytes unless a tensor alone is larger."""
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > largest:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += tensor.nbytes
    placed: dict[str, str] = {}
    for number, held in enumerate(files, 1):
        file = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_shard(folder / file, held, disk=DISK, metadata={"format": "pt"})
        placed |= dict.fromkeys(held, file)
        yield f"wrote {folder / file}"
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> tuple[list[str], dict[str, Any]]:
    """Write its files; what there is to say of them, and the ids by which a model begins and ends texts."""
    ids: dict[str, int | None] = {role: tokenizer.roles.get(role) for role in ("bos", "eos", "pad")}
    eod = tokenizer.roles.get("eod")
    ids["eos"] = eod if ids["eos"] is None else ids["eos"]
    named = {f"{role}_token_id": number for role, number in ids.items()}
    for name, content in tokenizer.files.items():
        write_whole(folder / name, content)
    kind = TOKENIZER_CLASSES.get(tokenizer.name)
    if kind is None:
        return [f"note: Hugging Face has no {tokenizer.name}; the model is there without a tokenizer"], named
    texts = _texts(tokenizer, {number for number in ids.values() if number is not None})
    tokens = {f"{role}_token": texts[number] for role, number in ids.items() if number is not None}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": kind, **tokens})
    return [], named


def _texts(tokenizer: Tokenizer, ids: set[int]) -> dict[int, str]:
    """How the files write the tokens with these ids."""
    if "vocab.json" in tokenizer.files:
        return {number: text for text, number in json.loads(tokenizer.files["vocab.json"]).items() if number in ids}
    from tokenizers import Tokenizer as LibraryTokenizer

    library = LibraryTokenizer.from_str(tokenizer.files["tokenizer.json"].decode())
    return {number: str(library.id_to_token(number)) for number in ids}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")

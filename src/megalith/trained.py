"""A trained model from its run directory, and what can be asked of it: text, and the loss of other text."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megalith.checkpoint.contents import check_contents
from megalith.checkpoint.index import Index
from megalith.checkpoint.pieces import TORCH_DTYPES, Piece, whole
from megalith.checkpoint.store import Loaded, load_latest
from megalith.config import ConfigError, Run, compose
from megalith.corpora import corpus_prefix
from megalith.data.blend import normalize, parse_data_path
from megalith.data.blocks import DocumentRules, read_blocks
from megalith.data.documents import Fault, parse_block
from megalith.data.indexed import find_prefix, open_indexed
from megalith.data.input_files import find_sources
from megalith.data.record import check_prepared
from megalith.data.split import split_documents
from megalith.data.tokenizer import Tokenizer, load_saved_tokenizer
from megalith.data_sets import data_sets
from megalith.derived import compute_dtype, sequence_length
from megalith.evaluate.generate import Sampling, tokens_held
from megalith.evaluate.loss import StreamLoss, stream_loss
from megalith.evaluate.talk import continuations, eod_of, shown, stream_text
from megalith.models.decoder import Decoder
from megalith.parallel.mesh import choose_device
from megalith.run_state import WEIGHT
from megalith.sources import read_run_file
from megalith.terminal import printable

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class TrainedModel:
    """A model as a run left it."""

    run: Run
    step: int
    tokenizer: Tokenizer
    model: Decoder


def open_trained(directory: str, *, step: int | None, device: str) -> TrainedModel:
    """The newest model of a run directory that verifies, or that of a step.

    Raises ValueError if there is none, or it is not a GPT.
    """
    run = run_of(directory)
    if run.task != "gpt":
        raise ValueError(f"{directory}: holds a {run.task} model; only a gpt continues text.")
    tokenizer = tokenizer_of(directory, run)
    model, found_step = load_weights(
        directory,
        lambda index: empty_model(run, int(index.state["model"]["padded_vocab_size"]), device),
        step=step,
        tokenizer=tokenizer,
    )
    return TrainedModel(run, found_step, tokenizer, model)


def run_of(directory: str) -> Run:
    """The run that made a run directory. Raises ValueError if it is none."""
    file = Path(directory) / "run.toml"
    if not file.is_file():
        raise ValueError(f"{directory}: is not a run directory (it has no run.toml). Name what --save named.")
    values, faults = read_run_file(file)
    if faults:
        raise ConfigError(faults)
    return compose(values.pop("task", "gpt"), values)


def load_weights(
    directory: str, build: Callable[[Index], Model], *, step: int | None, tokenizer: Tokenizer | None = None
) -> tuple[Model, int]:
    """A model with the weights of the newest checkpoint that verifies, or of a step; and which step it was.

    build: makes the model, with memory for its weights. tokenizer: that of the run directory, if texts are read.
    Raises ValueError if there is no checkpoint, or its model was trained on another tokenizer's tokens.
    """
    made: list[Model] = []

    def wanted(index: Index) -> dict[str, Piece]:
        check_contents(index)
        made[:] = [build(index)]
        return {WEIGHT + n: Piece(p.data, tuple(p.shape), (0,) * p.dim()) for n, p in made[0].named_parameters()}

    loaded = load_latest(directory, wanted, step=step, may_stay_unread=lambda name: not name.startswith(WEIGHT))
    if loaded is None:
        raise ValueError(f"{directory}: holds no checkpoint yet. Wait for one, or train longer.")
    if tokenizer is not None:
        refuse_another_tokenizer(directory, loaded.index, tokenizer)
    for message in loaded.messages(goes_on=False):
        print(f"warning: {printable(message)}", file=sys.stderr)
    return made[0], loaded.index.step


def load_tensors(
    directory: str, *, step: int | None, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, Tensor], Loaded]:
    """The wanted tensors of the newest checkpoint that verifies, or of a step, each whole, as they are stored.

    Raises ValueError if there is no checkpoint.
    """
    tensors: dict[str, Tensor] = {}

    def pieces(index: Index) -> dict[str, Piece]:
        check_contents(index)
        tensors.clear()
        for name, kept in index.tensors.items():
            if wanted(name):
                tensors[name] = torch.empty(kept.shape, dtype=TORCH_DTYPES[kept.dtype])
        return {name: whole(tensor) for name, tensor in tensors.items()}

    loaded = load_latest(directory, pieces, step=step, may_stay_unread=lambda name: not wanted(name))
    if loaded is None:
        raise ValueError(f"{directory}: holds no checkpoint. Name what --save named.")
    return tensors, loaded


def tokenizer_of(directory: str, run: Run) -> Tokenizer:
    """The tokenizer that a run directory keeps; ValueError if there is none, or its files are not those written."""
    folder = Path(directory) / "tokenizer"
    if run.data.mock_data and not folder.is_dir():
        raise ValueError(
            f"{directory}: was trained with --mock-data, on tokens that stand for no text. Name a run of real data."
        )
    return load_saved_tokenizer(folder)


def refuse_another_tokenizer(directory: str, index: Index, tokenizer: Tokenizer) -> None:
    """Raise ValueError if a checkpoint's model was trained on the tokens of another tokenizer than this."""
    digest = index.state["model"].get("tokenizer")
    if digest not in (None, tokenizer.digest):
        raise ValueError(
            f"{directory}: the model of step {index.step} was trained with another tokenizer than "
            f"{Path(directory) / 'tokenizer'}, which is {tokenizer.name}. Put its own files back there."
        )


def empty_model(run: Run, vocab_size: int, device: str) -> Decoder:
    """The model of a run with memory for its weights."""
    chosen, dtype = compute_type(run, device)
    return Decoder(run.model, vocab_size, dtype=dtype, device="meta").to_empty(device=chosen).eval()


def compute_type(run: Run, device: str, local_rank: int = 0) -> tuple[torch.device, torch.dtype]:
    """The device chosen, and the type in which a run's model computes there."""
    chosen = choose_device(device, local_rank)
    # 16-bit products are emulated on most processors.
    return chosen, torch.float32 if chosen.type == "cpu" else getattr(torch, compute_dtype(run))


def talk(
    directory: str, prompts: Sequence[str], sampling: Sampling, *, max_new_tokens: int, step: int | None, device: str
) -> int:
    """Print what follows each prompt: one as it is made, several when all are done; give the exit status."""
    trained = open_trained(directory, step=step, device=device)
    model, tokenizer = trained.model, trained.tokenizer
    cut = f"stopped at the {tokens_held(model)} tokens that the model can hold (max_position_embeddings)"
    if len(prompts) <= 1:
        if stream_text(model, tokenizer, "".join(prompts), max_new_tokens=max_new_tokens, sampling=sampling):
            print(cut, file=sys.stderr)
        return 0
    made = continuations(model, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling)
    for number, (prompt, (text, is_cut)) in enumerate(zip(prompts, made, strict=True), 1):
        print(f"--- {number} ---\n{shown(prompt + text)}", flush=True)
        if is_cut:
            print(f"prompt {number}: {cut}", file=sys.stderr)
    return 0


def measure(
    directory: str, *, split: str | None, files: Sequence[str], step: int | None, device: str
) -> dict[str, Any]:
    """Loss and perplexity of a split of the run's data, or of text files, as one object.

    Those of a blend are the means by its weights, beside those of each data set.
    """
    trained = open_trained(directory, step=step, device=device)
    window, name = sequence_length(trained.run), split or "valid"
    report: dict[str, Any] = {"run": directory, "step": trained.step, "data": list(files) or name}
    if files:
        tokens, num_bytes = text_tokens(trained, files)
        loss = stream_loss(trained.model, tokens, window=window)
        report |= _figures(loss)
        if num_bytes:
            report["bits_per_byte"] = loss.total / num_bytes / float(np.log(2))
        return report
    sets, weights = list[dict[str, Any]](), list[float]()
    for prefix, weight, tokens in split_tokens(trained, name):
        sets.append({"data_set": prefix, **_figures(stream_loss(trained.model, tokens, window=window))})
        weights.append(weight)
    if len(sets) == 1:
        return report | {figure: value for figure, value in sets[0].items() if figure != "data_set"}
    for part, share in zip(sets, normalize(weights), strict=True):
        part["share"] = share
    count = sum(part["tokens"] for part in sets)
    mean = sum(part["share"] * part["loss"] for part in sets)
    return report | _figures(StreamLoss(mean * count, count)) | {"data_sets": sets}


def _figures(loss: StreamLoss) -> dict[str, Any]:
    return {"tokens": loss.count, "loss": loss.mean, "perplexity": loss.perplexity}


def split_tokens(trained: TrainedModel, split: str) -> Iterator[tuple[str, float, NDArray[np.int64]]]:
    """For each data set that has documents of a split: its prefix, its weight, all tokens of these in its order."""
    run = trained.run
    if run.data.corpus is None and not run.data.data_path:
        raise ValueError(f"--split = {split}: the run has no data of its own. Name files: --file FILE.")
    if run.data.corpus is not None:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, data_path=(str(corpus_prefix(run)),)))
    sets = next(sets for sets in data_sets(run) if split in sets.parts)
    has_documents = False
    for prefix, weight in zip(*parse_data_path(sets.data_path), strict=True):
        if not weight:
            continue
        indexed = open_indexed(prefix, run.data.data_impl, merged=True)
        check_prepared(indexed.prefix, trained.tokenizer.digests)
        if documents := split_documents(sets.split, indexed.num_items)[split]:
            has_documents = True
            yield prefix, weight, np.concatenate([indexed.read(item) for item in documents]).astype(np.int64)
    if not has_documents:
        raise ValueError(f"--split = {split}: has no documents in this run ({sets.said}).")


def _prefix_of(name: str) -> Path | None:
    """The prefix of the token file that a name means: its own, or one of its two files; None for any other file."""
    try:
        return find_prefix(name)
    except ValueError:
        return None


def text_tokens(trained: TrainedModel, files: Sequence[str]) -> tuple[NDArray[np.int64], int]:
    """The tokens of token files (named by their prefix) or text files, and the bytes of the text (0 if not known)."""
    prefixes = [prefix for name in files if (prefix := _prefix_of(name)) is not None]
    if prefixes and len(prefixes) < len(files):
        raise ValueError(f"--file: {prefixes[0]} is a token file, and others are text. Give files of one kind.")
    if prefixes:
        for prefix in prefixes:
            check_prepared(prefix, trained.tokenizer.digests)
        return np.concatenate([open_indexed(prefix).tokens for prefix in prefixes]).astype(np.int64), 0
    rules = DocumentRules(keys=("text",))
    pieces: list[NDArray[np.int32]] = []
    num_bytes = 0
    # A name that does not say otherwise is text.
    marked = all(set(Path(name).suffixes) & {".json", ".jsonl", ".parquet"} for name in files)
    for block in read_blocks(find_sources(files, "auto" if marked else "text", flag="--file"), rules):
        for document in parse_block(block, rules):
            if isinstance(document, Fault):
                raise ValueError(str(document))
            num_bytes += sum(len(text.encode()) for text in document)
            pieces += trained.tokenizer.encode_batch(document)
            if (eod := eod_of(trained.tokenizer)) is not None:
                pieces.append(np.array([eod], np.int32))
    if not pieces:
        raise ValueError(f"{', '.join(files)}: hold no text to evaluate.")
    return np.concatenate(pieces).astype(np.int64), num_bytes

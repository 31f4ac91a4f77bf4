"""What strangers may bring is data or is refused: nothing runs, nothing hangs, nothing is written elsewhere.

PAYLOADS are programs for an unpickler, put in the place of every kind of file that is read. HOSTILE are files that say
something impossible or name what is not theirs.
"""

import builtins
import io
import json
import os
import pickle
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalith.check import check
from megalith.checkpoint.index import INDEX_NAME
from megalith.checkpoint.pieces import Piece
from megalith.checkpoint.store import load_latest, save
from megalith.cli import main
from megalith.config import ConfigError, compose, known_settings
from megalith.data.index_cache import ARRAYS, load_or_build_index_maps
from megalith.data.index_file import HEADER, MAGIC
from megalith.data.indexed import IndexedWriter, open_indexed
from megalith.data.input_files import find_sources
from megalith.data.inspect import inspect
from megalith.data.record import read_record, record_path
from megalith.data.sentences import split_sentences
from megalith.data.tokenizer import KINDS, MANIFEST, load_saved_tokenizer, load_tokenizer
from megalith.files import digest_of
from megalith.sources import read_command_line, read_run_file, settings_of_toml

LENGTHS = np.array([5, 1, 9, 14, 2, 7, 31, 3, 12, 6], np.int32)


class Payload:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def pickled(*call: Any) -> bytes:
    return pickle.dumps(Payload(*call))


def in_archive(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def as_array(content: bytes) -> bytes:
    """A .npy file whose elements are pickled."""
    header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + content


def payloads(canary: Path) -> dict[str, bytes]:
    """Each would make the canary if anything unpickled it."""
    touch = f"touch {canary}"
    write = f"open({str(canary)!r}, 'w').close()"
    torch_file = io.BytesIO()
    torch.save({"weight": Payload(os.system, touch)}, torch_file)
    return {
        "system": pickled(os.system, touch),
        "eval": pickled(builtins.eval, write),
        "exec": pickled(builtins.exec, write),
        "process": pickled(subprocess.call, ["touch", str(canary)]),
        "old protocol": b"cos\nsystem\n(S'" + touch.encode() + b"'\ntR.",
        "array": as_array(pickled(os.system, touch)),
        "arrays": in_archive("arr_0.npy", as_array(pickled(os.system, touch))),
        "torch": torch_file.getvalue(),
        "in JSON": json.dumps({"__reduce__": ["os.system", touch], "py/object": "os.system"}).encode(),
    }


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """One of every kind of file that is read."""
    with IndexedWriter(tmp_path / "corpus", "uint16") as writer:
        for length in LENGTHS:
            writer.add_document([np.full(length, 65)])
    maps(tmp_path)
    weight = torch.arange(6.0).view(2, 3)
    save(tmp_path / "run", 1, {"weight.w": Piece(weight, (2, 3), (0, 0))}, {"step": 1})
    vocabulary = {"a": 0, "b": 1, "<|endoftext|>": 2}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "vocab.txt").write_text("[UNK]\na\n")
    load_tokenizer("ByteLevelTokenizer").save(tmp_path / "saved")
    (tmp_path / "run.toml").write_text("[model]\nnum_layers = 2\n")
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def maps(place: Path) -> Any:
    return load_or_build_index_maps(
        place / "corpus", "train", documents=range(10), lengths=LENGTHS, num_samples=50, sequence_length=8, seed=7
    )[0]


def load_checkpoint(place: Path) -> None:
    weight = torch.zeros(2, 3)
    load_latest(place / "run", {"weight.w": Piece(weight, (2, 3), (0, 0))})
    assert torch.equal(weight, torch.arange(6.0).view(2, 3))


def read_settings(place: Path) -> None:
    values, faults = read_run_file(place / "run.toml")
    if faults:
        raise ConfigError(faults)
    assert values == {"num_layers": 2}


def prepare_text(place: Path) -> None:
    output = ["--output-prefix", str(place / "made"), "--tokenizer-type", "ByteLevelTokenizer", "--workers", "1"]
    if main(["preprocess", "--input", str(next(place.glob("in.*"))), *output]):
        raise ValueError("it was told on the error stream")


NPY = "corpus_train_indexmap_50ns_8sl_7s_{}.npy"
# What is put in the place of which file, and what then reads it.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "index of tokens": ("corpus.idx", lambda place: open_indexed(place / "corpus")),
    "tokens": ("corpus.bin", lambda place: open_indexed(place / "corpus")),
    "checkpoint's index": ("run/checkpoints/step-0000001/index.json", load_checkpoint),
    "checkpoint's shard": ("run/checkpoints/step-0000001/rank-00000.safetensors", load_checkpoint),
    "vocab.json": (
        "vocab.json",
        lambda place: load_tokenizer(
            "GPT2BPETokenizer", vocab_file=str(place / "vocab.json"), merge_file=str(place / "merges.txt")
        ),
    ),
    "merges.txt": (
        "merges.txt",
        lambda place: load_tokenizer(
            "GPT2BPETokenizer", vocab_file=str(place / "vocab.json"), merge_file=str(place / "merges.txt")
        ),
    ),
    "vocab.txt": (
        "vocab.txt",
        lambda place: load_tokenizer("BertWordPieceCase", vocab_file=str(place / "vocab.txt")),
    ),
    "tokenizer.json": (
        "tokenizer.json",
        lambda place: load_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(place / "tokenizer.json")),
    ),
    "sentencepiece": (
        "spm.model",
        lambda place: load_tokenizer("SentencePieceTokenizer", tokenizer_model=str(place / "spm.model")),
    ),
    "saved tokenizer": (f"saved/{MANIFEST}", lambda place: load_saved_tokenizer(place / "saved")),
    "run file": ("run.toml", read_settings),
    "JSON lines": ("in.jsonl", prepare_text),
}


def only_told(read: Callable[[Path], object], place: Path) -> str:
    """What a reader says against a file; it says something, in a sentence, within three seconds of processor time."""
    began = time.process_time()
    with pytest.raises((ValueError, RuntimeError, OSError)) as refused:
        read(place)
    assert time.process_time() - began < 3
    said = str(refused.value)
    assert len(said) > 20 and not isinstance(refused.value, RecursionError)
    return said


@pytest.mark.parametrize("target", READERS)
def test_a_payload_in_the_place_of_any_file_is_refused_and_does_not_run(target: str, place: Path) -> None:
    name, read = READERS[target]
    canary = place / "canary"
    for content in payloads(canary).values():
        (place / name).write_bytes(content)
        only_told(read, place)
    assert not canary.exists()


@pytest.mark.parametrize("name", [*(NPY.format(array) for array in ARRAYS), NPY.format("made_from")[:-4] + ".json"])
def test_a_payload_in_the_place_of_kept_arrays_is_replaced_and_does_not_run(name: str, place: Path) -> None:
    wanted = {path.name: path.read_bytes() for path in place.glob("*indexmap*")}
    canary = place / "canary"
    for content in payloads(canary).values():
        (place / name).write_bytes(content)
        assert len(maps(place)) >= 50
        assert {path.name: path.read_bytes() for path in place.glob("*indexmap*")} == wanted
    assert not canary.exists()


def forged_maps(place: Path, content: bytes) -> None:
    """Kept arrays whose record fits a forged array."""
    record = place / (NPY.format("made_from")[:-4] + ".json")
    path = place / NPY.format("doc_idx")
    path.write_bytes(content)
    said = json.loads(record.read_text())
    written = digest_of(path)
    said["files"]["doc_idx"] = {"size": written.size, "sha256": written.digest}
    record.write_text(json.dumps(said))


def npy(descr: str, shape: tuple[int, ...], data: bytes = b"") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue() + data


FORGED: dict[str, Callable[[Path], bytes]] = {
    "pickled elements": lambda canary: payloads(canary)["array"],
    "2^63 elements": lambda canary: npy("<i4", (2**63,)),
    "2^40 elements": lambda canary: npy("<i4", (2**40,)),
    "a negative shape": lambda canary: npy("<i4", (-5,)),
    "no array": lambda canary: b"x" * 100,
    "a header of 4 GB": lambda canary: b"\x93NUMPY\x02\x00" + b"\xff" * 4,
    "a header that is code": lambda canary: (
        b"\x93NUMPY\x01\x00\x40\x00" + b"__import__('os').system('touch canary')".ljust(64)
    ),
}


@pytest.mark.parametrize("kind", FORGED)
def test_kept_arrays_that_were_forged_together_with_their_record_are_replaced(kind: str, place: Path) -> None:
    wanted = {path.name: path.read_bytes() for path in place.glob("*indexmap*")}
    forged_maps(place, FORGED[kind](place / "canary"))
    assert len(maps(place)) >= 50
    assert {path.name: path.read_bytes() for path in place.glob("*indexmap*")} == wanted
    assert not (place / "canary").exists()


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


def write_text(name: str, text: str) -> Callable[[Path], object]:
    return lambda place: (place / name).write_text(text)


def write_index(items: int, entries: int) -> Callable[[Path], object]:
    return lambda place: (place / "corpus.idx").write_bytes(HEADER.pack(MAGIC, 1, 8, items, entries))


def link(name: str, to: str) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        path = place / name
        if path.is_dir():
            path.rename(path.with_name("moved away"))
        else:
            path.unlink(missing_ok=True)
        path.symlink_to(to)

    return make


def pipe(name: str) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        os.mkfifo(place / name)

    return make


def shard_of(length: int) -> Callable[[Path], object]:
    path = "run/checkpoints/step-0000001/rank-00000.safetensors"
    return lambda place: (place / path).write_bytes(length.to_bytes(8, "little") + b"{}")


STEP = "run/checkpoints/step-0000001"
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "2^63 items": (write_index(2**63, 1), "index of tokens"),
    "2^64 - 1 documents": (write_index(0, 2**64 - 1), "index of tokens"),
    "a header of 2^63 bytes": (shard_of(2**63), "checkpoint's shard"),
    "a header of 2^40 bytes": (shard_of(2**40), "checkpoint's shard"),
    "an index elsewhere": (link(f"{STEP}/{INDEX_NAME}", "/etc/passwd"), "checkpoint's index"),
    "a shard elsewhere": (link(f"{STEP}/rank-00000.safetensors", "/etc/passwd"), "checkpoint's shard"),
    "a shard that is a device": (link(f"{STEP}/rank-00000.safetensors", "/dev/zero"), "checkpoint's shard"),
    "tokens that are a device": (link("corpus.bin", "/dev/zero"), "tokens"),
    "an index that is a device": (link("corpus.idx", "/dev/zero"), "index of tokens"),
    "an index that is a pipe": (pipe("corpus.idx"), "index of tokens"),
    "an index that points at itself": (link("corpus.idx", "corpus.idx"), "index of tokens"),
    "a vocabulary that is a device": (link("vocab.json", "/dev/zero"), "vocab.json"),
    "a vocabulary that is a pipe": (pipe("vocab.json"), "vocab.json"),
    "a run file that is a device": (link("run.toml", "/dev/zero"), "run file"),
    "a run file that is a pipe": (pipe("run.toml"), "run file"),
    "a run file that points at itself": (link("run.toml", "run.toml"), "run file"),
    "text that is a device": (link("in.jsonl", "/dev/zero"), "JSON lines"),
    "text that is a pipe": (pipe("in.jsonl"), "JSON lines"),
    "text that points at itself": (link("in.jsonl", "in.jsonl"), "JSON lines"),
    "a vocabulary of brackets": (write_text("vocab.json", deep(200_000)), "vocab.json"),
    "a tokenizer of brackets": (write_text("tokenizer.json", deep(200_000)), "tokenizer.json"),
    "a run file of brackets": (write_text("run.toml", f"a = {deep(200_000)}"), "run file"),
    "a run file of keys": (write_text("run.toml", "a" + ".a" * 100_000 + " = 1"), "run file"),
    "a run file of many keys": (write_text("run.toml", ("a" + ".a" * 900 + " = 1\n") * 100), "run file"),
    "a run file of a long number": (write_text("run.toml", f"num_layers = 1{'0' * 100_000}"), "run file"),
    "a line of brackets": (write_text("in.jsonl", deep(200_000) + "\n"), "JSON lines"),
    "a line of a long number": (write_text("in.jsonl", f'{{"text": "a", "n": 1{"0" * 10_000}e}}\n'), "JSON lines"),
    "an id of 10,000 digits": (write_text("vocab.json", f'{{"a": 1{"0" * 10_000}}}'), "vocab.json"),
    "a run file that computes": (write_text("run.toml", "[model]\nnum_layers = '__import__(\"os\")'\n"), "run file"),
    "a run file that names a class": (write_text("run.toml", "[model]\n_target_ = 'os.system'\n"), "run file"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_cannot_be_is_refused_in_a_sentence_at_once(kind: str, place: Path) -> None:
    change, target = HOSTILE[kind]
    change(place)
    only_told(READERS[target][1], place)


def test_there_are_as_many_payloads_and_hostile_files_as_is_said() -> None:
    count = (len(READERS) + len(ARRAYS) + 1) * len(payloads(Path("x"))) + len(FORGED) + len(HOSTILE)
    assert count >= 170, count


@pytest.mark.parametrize("text", [deep(1000), '{"megalith": 1' + "0" * 10000 + "}", '{\n "megalith": "1"}'])
def test_a_hostile_record_is_none_or_refused(text: str, place: Path) -> None:
    record_path(place / "corpus").write_text(text)
    try:
        assert read_record(place / "corpus") is None
    except ValueError as error:
        assert "expected what was written" in str(error)


def test_a_record_of_kept_arrays_that_is_a_pipe_is_not_waited_for(place: Path) -> None:
    path = place / (NPY.format("made_from")[:-4] + ".json")
    path.unlink()
    os.mkfifo(path)
    assert len(maps(place)) >= 50
    assert path.is_file()


def test_inputs_that_are_no_files_are_refused_together(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    names = [str(tmp_path / "pipe"), str(tmp_path / "loop"), str(tmp_path / "gone"), "/dev/zero", str(tmp_path)]
    with pytest.raises(ValueError, match="is a pipe") as refused:
        find_sources(names)
    assert all(f"--input {name}: " in str(refused.value) for name in names)


def test_nothing_is_unpickled_or_started_while_a_runs_files_are_read(place: Path) -> None:
    def read_everything() -> None:
        load_checkpoint(place)
        open_indexed(place / "corpus")
        assert not inspect(place / "corpus").faults
        maps(place)
        read_settings(place)
        load_saved_tokenizer(place / "saved")
        READERS["vocab.txt"][1](place)
        assert main(["verify", str(place / "run"), str(place / "corpus")]) == 1  # it has no run.toml of its own

    read_everything()  # what is imported at the first use is imported before the hook is set
    guarded = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket")
    if (child := os.fork()) == 0:
        status = 1
        try:

            def refuse(event: str, arguments: Any) -> None:
                if event.startswith(guarded):
                    raise RuntimeError(event)

            sys.addaudithook(refuse)
            read_everything()
            try:
                pickle.loads(pickled(builtins.len, "a"))
            except RuntimeError:  # the hook would have seen it
                status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_a_pattern_of_a_tokenizer_that_never_ends_is_given_up_in_a_sentence(tmp_path: Path) -> None:
    vocabulary = {"a": 0, "b": 1}
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model})
    )
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("ab") == [0, 1]
    began = time.process_time()
    with pytest.raises(ValueError, match="retry-limit"):
        tokenizer.encode("a" * 5000 + "b")
    assert time.process_time() - began < 3


REPEATED = [
    "a",
    " ",
    "\n",
    ".",
    "a. ",
    '"',
    "(",
    "!?",
    "Mr. ",
    "\t\n",
    "'s",
    "A.",
    "\u2014",
    " \n",
    "1",
    "\u200d",
    "x\u0301",
]


@pytest.mark.parametrize("unit", REPEATED)
def test_no_text_takes_more_than_its_length_deserves(unit: str, golden: Path) -> None:
    files = {"vocab_file": str(golden / "small-vocab.json"), "merge_file": str(golden / "small-merges.txt")}
    tokenizer = load_tokenizer("GPT2BPETokenizer", **files)  # type: ignore[arg-type]
    text = unit * 30_000
    began = time.process_time()
    split_sentences(text, keep_newlines=True)
    tokenizer.encode(text)
    # Quadratic work would take minutes, what is linear takes 0.1 s.
    assert time.process_time() - began < 3


TEXTS = ["", "x", "1e9", "__import__('os')", "\x1b[2J", "a" * 5000]
NUMBERS = [0, -1, 1, 2**63, -(2**70), 10**400, 1.5, float("nan"), float("inf"), True]
WORDS: list[Any] = [*TEXTS, *NUMBERS, [], [1, "a"], {"a": 1}, None]


def random_run(chance: random.Random, names: list[str]) -> Mapping[str, Any]:
    base: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "seq_length": 8,
        "max_position_embeddings": 8,
    }
    base |= {"micro_batch_size": 1, "train_iters": 3, "lr": 1e-3, "mock_data": True}
    return {**base, **{chance.choice(names): chance.choice(WORDS) for _ in range(chance.randint(1, 5))}}


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value)
    return {"True": "true", "None": "nil"}.get(str(value), str(value))


@pytest.mark.parametrize("num_runs", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_run_files_are_runs_or_faults_and_nothing_else(num_runs: int) -> None:
    chance = random.Random(5)
    known = known_settings()
    refused = runs = 0
    for _ in range(num_runs):
        values = random_run(chance, [*known, "unknown", "task"])
        text = "\n".join(f"{name} = {toml(value)}" for name, value in values.items())
        settings, faults = settings_of_toml(text, "run.toml")
        if not faults:
            faults = check(compose(settings.pop("task", "gpt"), settings), chance.choice([1, 2, 7, 8]))
        assert all(str(fault) for fault in faults)
        refused += bool(faults)
        runs += not faults
    assert refused > num_runs // 2 and runs > 0


@pytest.mark.parametrize("num_runs", [60, pytest.param(2_000, marks=pytest.mark.slow)])
def test_random_command_lines_are_runs_or_faults_and_nothing_else(num_runs: int) -> None:
    chance = random.Random(6)
    flags = [flag for known in known_settings().values() for flag in known.flags]
    for _ in range(num_runs):
        words = [
            chance.choice(["gpt", "bert", "x.toml", "--preset", "quickstart", ""]) for _ in range(chance.randint(0, 2))
        ]
        for _ in range(chance.randint(1, 6)):
            words += [
                chance.choice([*flags, "--nothing"]),
                *(str(chance.choice(WORDS)) for _ in range(chance.randint(0, 2))),
            ]
        try:
            check(read_command_line(words), chance.choice([1, 2, 8]))
        except ConfigError as error:
            assert error.faults


ESCAPE = "\x1b]0;title\x07\x1b[2J\u202e"


@pytest.mark.parametrize(
    "words",
    [
        ["verify", f"no{ESCAPE}where"],
        ["pretrain", f"{ESCAPE}.toml"],
        ["pretrain", f"--{ESCAPE}"],
        ["generate", f"{ESCAPE}"],
        ["evaluate", f"{ESCAPE}"],
        ["preprocess", "--input", f"{ESCAPE}", "--output-prefix", "x", "--tokenizer-type", "ByteLevelTokenizer"],
        ["convert", "--to", f"{ESCAPE}", "a", "b"],
        [f"{ESCAPE}"],
    ],
    ids=lambda words: str(words[0]).encode("unicode_escape").decode()[:9],
)
def test_a_terminal_obeys_no_name(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert not set(captured.out + captured.err) & set(ESCAPE) - set("title0;[]2J")
    assert "\\x1b" in captured.err


def test_a_terminal_obeys_no_name_of_what_was_prepared(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input", str(place / "in.jsonl"), "--tokenizer-type", "ByteLevelTokenizer", "--workers", "1"]
    assert main(["preprocess", *words, "--output-prefix", str(place / f"a{ESCAPE}b")]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_every_kind_of_tokenizer_names_its_files_itself() -> None:
    assert all("/" not in name and ".." not in name for files in KINDS.values() for name in files)

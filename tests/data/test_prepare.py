"""`megalith preprocess` from input to token files: what is written, in what order, and what is left when it fails."""

import errno
import gzip
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import megalith
import megalith.data.blocks
from megalith.data.indexed import IndexedDataset
from megalith.data.prepare import PrepareConfig, prepare
from megalith.data.sentences import split_sentences
from megalith.data.tokenizer import load_tokenizer
from megalith.files import Disk
from megalith.preprocess import main

EOD = 256  # of the byte-level tokenizer
WORDS = st.sampled_from(["", "One. Two! ", "caf\u00e9 ", "\n\n", "the cat ", " ", "\u4e2d\u6587\u3002", "x" * 50])
texts = st.lists(WORDS, max_size=6).map("".join)


def write_jsonl(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def config_for(folder: Path, *inputs: str, **settings: Any) -> PrepareConfig:
    given = {"tokenizer_type": "ByteLevelTokenizer", "output_prefix": str(folder / "out"), "workers": 1, **settings}
    return PrepareConfig(input=inputs, **given)


def documents_in(prefix: Path) -> list[list[list[int]]]:
    """The tokens of each item of each document."""
    data = IndexedDataset(prefix)
    bounds = data.document_index.tolist()
    return [[data.read(item).tolist() for item in range(a, b)] for a, b in itertools.pairwise(bounds)]


def as_bytes(*texts: str) -> list[list[list[int]]]:
    return [[list(text.encode())] for text in texts]


def left_in(folder: Path) -> list[str]:
    """Everything in a folder but what the test put there, temporary files too."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("in"))


def test_every_text_is_a_document_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    report = prepare(config_for(tmp_path, write_jsonl(tmp_path / "in.jsonl", "one", "", "two\n", "\u4e2d")))
    assert documents_in(tmp_path / "out_text_document") == as_bytes("one", "two\n", "\u4e2d")
    assert (report.documents, report.sets[0].documents, report.sets[0].tokens) == (4, 3, 10)
    assert left_in(tmp_path) == ["out_text_document.bin", "out_text_document.idx", "out_text_document.json"]


@pytest.mark.parametrize("text_documents", ["line", "paragraph"])
def test_a_name_that_does_not_tell_is_of_text_where_documents_of_text_are_spoken_of(
    tmp_path: Path, text_documents: str
) -> None:
    source = tmp_path / "input"
    source.write_text("one\n\ntwo\n")
    prepare(config_for(tmp_path, str(source), text_documents=text_documents))
    assert documents_in(tmp_path / "out_text_document") == as_bytes("one", "two")
    with pytest.raises(ValueError, match="say so with --input-format text"):
        prepare(config_for(tmp_path, str(source), overwrite=True))


def test_the_end_of_document_follows_the_last_item(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", "One. Two.", "", "Three.", "  ")
    prepare(config_for(tmp_path, source, append_eod=True))
    whole = [[[*text.encode(), EOD]] for text in ("One. Two.", "Three.", "  ")]
    assert documents_in(tmp_path / "out_text_document") == whole
    prepare(config_for(tmp_path, source, append_eod=True, split_sentences=True))
    # The text of blanks has no sentence, so it is left out although the end-of-document token would be one.
    split = [[list(b"One."), [*b"Two.", EOD]], [[*b"Three.", EOD]]]
    assert documents_in(tmp_path / "out_text_sentence") == split


def test_newlines_between_sentences_can_be_kept(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", "One.\n\n Two.\n")
    prepare(config_for(tmp_path, source, split_sentences=True, keep_newlines=True))
    assert documents_in(tmp_path / "out_text_sentence") == [[list(b"One.\n\n "), list(b"Two.\n")]]


def test_sentences_without_tokens_are_dropped(tmp_path: Path, golden: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", "Hello. \u200b\u3002 World.", "\u200b")
    prepare(
        config_for(
            tmp_path,
            source,
            split_sentences=True,
            tokenizer_type="BertWordPieceCase",
            vocab_file=str(golden / "bert-vocab.txt"),
        )
    )
    assert documents_in(tmp_path / "out_text_sentence") == [[[23, 15], [1], [24, 15]]]


def test_every_key_has_files_of_its_own(tmp_path: Path) -> None:
    rows = [{"title": "A", "text": "first"}, {"title": "", "text": "second"}, {"title": "C", "text": ""}]
    rows.append({"title": "D", "text": "last"})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = prepare(config_for(tmp_path, str(tmp_path / "in.jsonl"), json_keys=("title", "text")))
    # Documents of one key are those of the other.
    assert documents_in(tmp_path / "out_title_document") == as_bytes("A", "D")
    assert documents_in(tmp_path / "out_text_document") == as_bytes("first", "last")
    assert [made.key for made in report.sets] == ["title", "text"]
    assert "2 documents that have not a token under each key left out" in "\n".join(report.lines())


def test_keys_that_are_split_and_ended_have_the_same_documents(tmp_path: Path) -> None:
    rows = [{"a": "One. Two.", "b": "First"}, {"a": " ", "b": "Second. Third."}, {"a": "Three.", "b": "Last."}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"json_keys": ("a", "b"), "split_sentences": True, "append_eod": True}
    prepare(config_for(tmp_path, str(tmp_path / "in.jsonl"), **words))
    assert documents_in(tmp_path / "out_a_sentence") == [[list(b"One."), [*b"Two.", EOD]], [[*b"Three.", EOD]]]
    assert documents_in(tmp_path / "out_b_sentence") == [[[*b"First", EOD]], [[*b"Last.", EOD]]]


def test_files_of_all_formats_follow_each_other_in_the_given_order(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("from text")
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(b'{"text": "from gzip"}\n'))
    pq.write_table(pa.table({"text": ["from", "parquet"]}), tmp_path / "in.parquet")
    names = [str(tmp_path / name) for name in ("in.txt", "in.parquet", "in.jsonl.gz")]
    prepare(config_for(tmp_path, *names))
    assert documents_in(tmp_path / "out_text_document") == as_bytes("from text", "from", "parquet", "from gzip")


@given(st.lists(texts, min_size=1, max_size=30), st.booleans(), st.booleans(), st.integers(50, 400))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, many: list[str], append_eod: bool, split: bool, read_size: int
) -> None:
    folder = tmp_path_factory.mktemp("workers")
    source = write_jsonl(folder / "in.jsonl", "never empty.", *many)
    chosen = {"append_eod": append_eod, "split_sentences": split}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megalith.data.blocks, "READ_SIZE", read_size)
        for workers in (1, 3):
            prepare(config_for(folder, source, output_prefix=str(folder / f"w{workers}"), workers=workers, **chosen))
    level = "sentence" if split else "document"
    for suffix in ("bin", "idx"):
        alone = (folder / f"w1_text_{level}.{suffix}").read_bytes()
        assert (folder / f"w3_text_{level}.{suffix}").read_bytes() == alone
    eod = [EOD] if append_eod else []
    expected = []
    for text in ["never empty.", *many]:
        items = [list(part.encode()) for part in (split_sentences(text) if split else [text]) if part]
        if items:
            items[-1] += eod
            expected.append(items)
    assert documents_in(folder / f"w1_text_{level}") == expected


def test_workers_use_the_very_tokenizer_of_the_parent(tmp_path: Path, golden: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", *("the cat's 123 <|endoftext|>" for _ in range(50)))
    files = {"vocab_file": str(golden / "small-vocab.json"), "merge_file": str(golden / "small-merges.txt")}
    prepare(config_for(tmp_path, source, tokenizer_type="GPT2BPETokenizer", workers=2, append_eod=True, **files))
    tokenizer = load_tokenizer("GPT2BPETokenizer", **files)  # type: ignore[arg-type]
    expected = [[[*tokenizer.encode("the cat's 123 <|endoftext|>"), tokenizer.eod]]] * 50
    assert documents_in(tmp_path / "out_text_document") == expected


def test_the_file_beside_the_tokens_says_what_they_are(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", "One. Two.", "bad")
    with open(source, "a") as file:
        file.write("not JSON\n")
    prepare(config_for(tmp_path, source, append_eod=True, split_sentences=True, skip_bad=True))
    content = json.loads((tmp_path / "out_text_sentence.json").read_text())
    assert (content["documents"], content["sentences"], content["tokens"]) == (2, 3, 13)
    assert (content["skipped_documents"], content["eod"]) == (1, EOD)
    assert content["tokenizer"] == {
        "type": "ByteLevelTokenizer",
        "vocab_size": 257,
        "digest": load_tokenizer("ByteLevelTokenizer").digest,
    }
    for name in ("out_text_sentence.bin", "out_text_sentence.idx"):
        data = (tmp_path / name).read_bytes()
        assert content["files"][name] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = Path(source).read_bytes()
    digest = hashlib.sha256(text).hexdigest()
    assert content["sources"] == [{"name": source, "size": len(text), "sha256": digest}]
    assert content["largest_token"] == EOD


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_document_stops_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(megalith.data.blocks, "READ_SIZE", 100)
    good = [json.dumps({"text": "x" * 30}) for _ in range(40)]
    lines = [*good[:20], '{"text": 1}', *good[20:30], "worse", *good[30:]]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    offset = len("\n".join(lines[:20])) + 1
    message = (
        rf"in.jsonl, line 21, byte offset {offset}: the value of 'text' must be text, but is a number; correct it, or"
    )
    with pytest.raises(ValueError, match=message):
        prepare(config_for(tmp_path, str(tmp_path / "in.jsonl"), workers=workers))
    assert left_in(tmp_path) == []


def test_bad_documents_are_skipped_and_counted_on_request(tmp_path: Path) -> None:
    (tmp_path / "in1.jsonl").write_bytes(b'{"text": "one"}\n{"text": 2}\n\xff\n{"text": "three"}\n')
    (tmp_path / "in2.jsonl").write_bytes(b"")
    (tmp_path / "in3.txt").write_bytes(b"four")
    report = prepare(config_for(tmp_path, str(tmp_path / "in*.*"), skip_bad=True, max_document_mb=1))
    assert documents_in(tmp_path / "out_text_document") == as_bytes("one", "three", "four")
    assert report.skipped == 3
    assert [fault.rpartition("/")[2].partition(":")[0] for fault in report.faults] == [
        "in1.jsonl, line 2, byte offset 16",
        "in1.jsonl, line 3, byte offset 28",
        "in2.jsonl, line 1, byte offset 0",
    ]
    assert any("skipped 3 documents" in line for line in report.lines())


@pytest.mark.parametrize("workers", [1, 2])
def test_the_fault_that_is_told_is_the_first_of_the_input(tmp_path: Path, workers: int) -> None:
    """However far reading is ahead of the workers."""
    (tmp_path / "in1.jsonl").write_text("bad\n")
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % number for number in range(3000)))
    (tmp_path / "in2.jsonl.gz").write_bytes(whole[:-9])
    names = [str(tmp_path / "in1.jsonl"), str(tmp_path / "in2.jsonl.gz")]
    with pytest.raises(ValueError, match=r"in1.jsonl, line 1, byte offset 0: is not JSON"):
        prepare(config_for(tmp_path, *names, workers=workers))
    with pytest.raises(ValueError, match=r"in2.jsonl.gz: the gzip file ends early"):
        prepare(config_for(tmp_path, *names, workers=workers, skip_bad=True))
    assert left_in(tmp_path) == []


def test_input_without_any_token_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", "", "")
    with pytest.raises(
        ValueError, match="no document of the input has a token under the key 'text'; nothing is written"
    ):
        prepare(config_for(tmp_path, source))
    with pytest.raises(ValueError, match="nothing but blank lines"):
        prepare(config_for(tmp_path, write_jsonl(tmp_path / "in2.jsonl")))
    assert left_in(tmp_path) == []


def test_existing_token_files_stay_unless_told_otherwise(tmp_path: Path) -> None:
    old = write_jsonl(tmp_path / "in1.jsonl", "old")
    new = write_jsonl(tmp_path / "in2.jsonl", "new")
    prepare(config_for(tmp_path, old))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    told = r"--output-prefix \S+out: \S+out_text_document.bin exists already; replace it with --overwrite, or"
    with pytest.raises(ValueError, match=told):
        prepare(config_for(tmp_path, new))
    (tmp_path / "in3.jsonl").write_text("bad")
    with pytest.raises(ValueError, match="is not JSON"):
        prepare(config_for(tmp_path, str(tmp_path / "in3.jsonl"), overwrite=True))
    (tmp_path / "in3.jsonl").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    prepare(config_for(tmp_path, new, overwrite=True))
    assert documents_in(tmp_path / "out_text_document") == as_bytes("new")
    digest = json.loads((tmp_path / "out_text_document.json").read_text())["files"]["out_text_document.bin"]["sha256"]
    assert digest == hashlib.sha256(b"n\0e\0w\0").hexdigest()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "No space left on device); make room there"),
        (errno.EACCES, "Permission denied); choose a directory that you may write to"),
        (errno.EIO, "Input/output error); choose another place"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_with_its_flag_and_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(disk: Disk, descriptor: int, data: memoryview) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Disk, "write", refuse)
    with pytest.raises(ValueError) as caught:
        prepare(config_for(tmp_path, write_jsonl(tmp_path / "in.jsonl", "text")))
    path = tmp_path / "out_text_document.idx"  # the tokens wait in memory until they are many
    assert str(caught.value).startswith(f"--output-prefix {tmp_path}/out: {path} cannot be written ({remedy}")
    assert left_in(tmp_path) == []


def test_an_output_below_a_file_is_told_with_its_flag(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", "text")
    with pytest.raises(ValueError, match=r"--output-prefix .*in.jsonl/deep/out: .* cannot be written \(Not a dir"):
        prepare(config_for(tmp_path, source, output_prefix=f"{source}/deep/out"))


def test_text_in_another_encoding_is_told_with_what_converts_it(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"is not UTF-8: byte 0xe9.*iconv -f LATIN1 -t UTF-8"):
        prepare(config_for(tmp_path, str(tmp_path / "in.txt")))


def test_text_where_json_lines_are_expected_is_told_with_the_flag_that_reads_it(tmp_path: Path) -> None:
    for text in ("Once upon a time\n", "42\n"):
        (tmp_path / "in").write_text(text)
        with pytest.raises(ValueError, match="; if this is plain text, say so with --input-format text"):
            prepare(config_for(tmp_path, str(tmp_path / "in")))
        (tmp_path / "in.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"leave such documents out with --skip-bad$"):
            prepare(config_for(tmp_path, str(tmp_path / "in.jsonl")))


def test_all_faults_of_the_settings_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        prepare(
            PrepareConfig(
                input=(str(tmp_path / "none.jsonl"),),
                dataset_impl="lazy",
                workers=0,
                keep_newlines=True,
                json_keys=("a/b",),
                tokenizer_type="GPT2BPETokenizer",
            )
        )
    faults = str(caught.value).splitlines()
    assert [fault.partition(" is")[0].partition(":")[0].partition(" has")[0] for fault in faults] == [
        "--output-prefix",
        "--dataset-impl lazy",
        "--workers 0 must be at least 1",
        "--keep-newlines",
        "--json-keys 'a/b' cannot be part of a file name; rename the field",
        f"--input {tmp_path}/none.jsonl",
        "GPT2BPETokenizer needs --vocab-file, the path of a vocab.json",
    ]


def test_append_eod_needs_a_token_for_it(tmp_path: Path, golden: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", "x")
    vocab = str(golden / "bert-vocab.txt")
    with pytest.raises(ValueError, match="--append-eod: BertWordPieceCase has no token that ends a document"):
        prepare(config_for(tmp_path, source, append_eod=True, tokenizer_type="BertWordPieceCase", vocab_file=vocab))


def test_plain_text_has_one_field(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("x")
    with pytest.raises(ValueError, match="plain text has one field, but --json-keys names 2"):
        prepare(config_for(tmp_path, str(tmp_path / "in.txt"), json_keys=("a", "b")))


def many_documents(folder: Path) -> str:
    """An input large enough to be interrupted."""
    text = json.dumps({"text": "All work and no play makes Jack a dull boy. " * 200}) + "\n"
    (folder / "in.jsonl").write_text(text * 8000)
    return str(folder / "in.jsonl")


def start_command(folder: Path, source: str) -> subprocess.Popen[str]:
    """`megalith preprocess` as a program of its own, once its workers work."""
    package = str(Path(megalith.__file__).parent.parent)
    words = ["--input", source, "--output-prefix", str(folder / "out"), "--tokenizer-type", "ByteLevelTokenizer"]
    code = (
        "import sys, megalith.data.prepare_progress as progress; from megalith.cli import main;"
        "progress.SECONDS_BETWEEN_LINES = 0; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            "preprocess",
            *words,
            "--workers",
            "2",
            "--split-sentences",
            "--log-interval",
            "1",
        ],
        env={**os.environ, "PYTHONPATH": package},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    process.stderr.readline()
    return process


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def all_threads_children(pid: int) -> list[int]:
    """Workers are started by threads of the parent, so they are children of those."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(word) for task in tasks for word in (task / "children").read_text().split()]


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")


@needs_proc
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "ended by SIGTERM"),
        (signal.SIGHUP, "ended by SIGHUP"),
    ],
)
def test_an_interrupted_run_leaves_no_file_and_no_process(number: signal.Signals, said: str, tmp_path: Path) -> None:
    process = start_command(tmp_path, many_documents(tmp_path))
    workers = all_threads_children(process.pid)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == f"megalith: {said}"
    assert "Traceback" not in errors
    assert len(workers) == 2
    assert wait_until(lambda: not any(is_running(pid) for pid in workers))
    assert left_in(tmp_path) == []


@needs_proc
def test_a_killed_run_leaves_nothing_that_looks_like_data(tmp_path: Path) -> None:
    process = start_command(tmp_path, many_documents(tmp_path))
    workers = all_threads_children(process.pid)
    process.kill()
    process.communicate(timeout=30)
    assert wait_until(lambda: not any(is_running(pid) for pid in workers))
    assert all(name.endswith(".tmp") for name in left_in(tmp_path))


@needs_proc
def test_a_worker_that_dies_is_named_and_stops_the_run(tmp_path: Path) -> None:
    process = start_command(tmp_path, many_documents(tmp_path))
    victim, other = all_threads_children(process.pid)
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    message = (
        f"megalith: a tokenizing process (pid {victim}) was ended by SIGKILL; if memory ran out, use fewer --workers"
    )
    assert errors.splitlines()[-1] == message
    assert wait_until(lambda: not is_running(other))
    assert left_in(tmp_path) == []


def test_a_worker_that_fails_by_itself_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", "x")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ChildProcessError, match=r"a tokenizing process \(pid \d+\) ended with status 1"):
        prepare(config_for(tmp_path, source, workers=2))
    assert left_in(tmp_path) == []


def test_preparing_does_not_import_torch() -> None:
    package = str(Path(megalith.__file__).parent.parent)
    code = "import sys, megalith.data.prepare, megalith.data.worker_pool; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": package}, check=True)


def test_the_command_reads_the_references_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", "One. Two.")
    words = f"--input {source} --json-keys text --split-sentences --keep-newlines --tokenizer-type ByteLevelTokenizer"
    words += f" --append-eod --output-prefix {tmp_path}/out --dataset-impl mmap --workers 1 --log-interval 100"
    assert main(words.split()) == 0
    assert documents_in(tmp_path / "out_text_sentence") == [[list(b"One. "), [*b"Two.", EOD]]]
    assert f"{tmp_path}/out_text_sentence: 1 document, 2 sentences, 10 tokens" in capsys.readouterr().out


def peak_memory(source: str, folder: Path) -> int:
    """MiB that a process needs at its peak to prepare a file."""
    code = (
        "import sys; from megalith.data.prepare import PrepareConfig, prepare;"
        "prepare(PrepareConfig(input=(sys.argv[1],), output_prefix=sys.argv[2], tokenizer_type='ByteLevelTokenizer',"
        "workers=1), quiet=True); print(open('/proc/self/status').read())"
    )
    command = [sys.executable, "-c", code, source, str(folder / Path(source).stem)]
    environment = {**os.environ, "PYTHONPATH": str(Path(megalith.__file__).parent.parent)}
    status = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    # Not what getrusage says, in which is the peak of the process that started this one.
    return next(int(line.split()[1]) >> 10 for line in status.splitlines() if line.startswith("VmHWM"))


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    document = json.dumps({"text": "All work and no play makes Jack a dull boy. " * 50}) + "\n"
    (tmp_path / "in1.jsonl").write_text(document * 2_000)
    (tmp_path / "in2.jsonl").write_text(document * 40_000)
    small, large = (peak_memory(str(tmp_path / name), tmp_path) for name in ("in1.jsonl", "in2.jsonl"))
    assert (tmp_path / "in2.jsonl").stat().st_size > 80 << 20
    assert large - small < 25


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--inputs", "x"], "unrecognized arguments: --inputs x. Did you mean --input?"),
        (["--workers", "many"], "argument --workers: invalid int value: 'many'; see megalith preprocess --help"),
        (["--dataset-impl", "mmap2"], "argument --dataset-impl: invalid choice: 'mmap2'"),
    ],
)
def test_wrong_words_are_answered(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        main(words)
    assert str(caught.value).startswith(message)


def test_help_shows_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in PrepareConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown


def test_a_single_document_comes_with_advice(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("One paragraph.\n\nAnother.")
    report = prepare(config_for(tmp_path, str(tmp_path / "in.txt")))
    assert any("--text-documents paragraph" in line for line in report.lines())
    assert [line.split(",")[0].split(": ")[-1] for line in report.lines()][:2] == ["1 document"] * 2
    report = prepare(config_for(tmp_path, str(tmp_path / "in.txt"), text_documents="paragraph", overwrite=True))
    assert report.sets[0].documents == 2
    assert not any("--text-documents" in line for line in report.lines())
    (tmp_path / "in.jsonl").write_text('{"text": "One document."}')
    report = prepare(config_for(tmp_path, str(tmp_path / "in.jsonl"), overwrite=True))
    advice = "cut the text: into several JSON objects, or plain text with --text-documents paragraph"
    assert any(line.endswith(advice) for line in report.lines())


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("paragraph", "into several JSON objects, or plain text with --text-documents line"),
        ("line", "into several JSON objects, or plain text into lines"),
    ],
)
def test_the_advice_for_a_single_document_is_not_what_was_given(given: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("One line.\n")
    report = prepare(config_for(tmp_path, str(tmp_path / "in.txt"), text_documents=given))
    assert any(line.endswith(f"or cut the text: {advice}") for line in report.lines())


def test_token_files_take_the_smallest_type_that_fits(tmp_path: Path) -> None:
    prepare(config_for(tmp_path, write_jsonl(tmp_path / "in.jsonl", "x")))
    assert IndexedDataset(tmp_path / "out_text_document").dtype == np.uint16

"""A run goes on only as the same run: other data, another seed or another split is refused, or allowed and told."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalith import run_state
from megalith.checkpoint.directory import list_checkpoints
from megalith.checkpoint.index import parse, render
from megalith.cli import OUT_OF_MEMORY, main
from megalith.config import Run, known_settings
from megalith.continuity import (
    CHANGE_NOTHING,
    DECIDE_SAMPLES,
    PARTS,
    check_same_samples,
    decisive,
    tell_differences,
)
from megalith.data.indexed import IndexedWriter, open_indexed
from megalith.data.record import write_record
from megalith.data.tokenizer import load_tokenizer
from megalith.files import Disk
from megalith.monitor.log import RunLog
from megalith.owner import Lease
from megalith.trained import measure, open_trained
from megalith.verify import verify_all
from tests.layouts.runs import MODEL, events_of, run_on, run_rank, weights_of, write_data
from tests.ranks import watch_ranks
from tests.sentences import write_vocabulary

FEW = "--eval-iters 0 --save-interval 2 --lr-warmup-iters 0 --use-checkpoint-lr-scheduler".split()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of two steps, and the token file of the run."""
    folder = tmp_path_factory.mktemp("kept")
    assert run_on(1, [*FEW[:-1], "--train-iters", "2"], folder / "run", write_data(folder)) == 0
    return folder


@pytest.fixture
def save(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept / "run", tmp_path / "run"))


@pytest.fixture
def data(kept: Path, tmp_path: Path) -> Path:
    for suffix in (".bin", ".idx"):
        shutil.copy(kept / f"bytes_document{suffix}", tmp_path / f"moved{suffix}")
    return tmp_path / "moved"


def refusal(save: Path, data: Path, *words: str, kind: str = "ValueError") -> str:
    """Why a run does not start, by an error of this kind."""
    words = (*MODEL, "--data-path", str(data), "--save", str(save), *FEW, "--train-iters", "4", *words)
    (end,) = watch_ranks(lambda rank: run_rank(rank, world_size=1, words=list(words), before=None), 1)
    assert f"{kind}: " in end.error, end
    return end.error.rsplit(f"{kind}: ", 1)[1]


def warnings_of(save: Path) -> list[str]:
    return [record["text"] for record in events_of(save, "warned")]


def write_other(prefix: Path, like: Path) -> None:
    """A corpus with documents of the same lengths in another order, of the same size."""
    indexed = open_indexed(like)
    with IndexedWriter(prefix, indexed.dtype, overwrite=True) as writer:
        for item in reversed(range(indexed.num_items)):
            writer.add_document([indexed.read(item)])


def test_data_may_move_and_settings_that_differ_are_told(save: Path, data: Path) -> None:
    assert run_on(1, [*FEW, "--train-iters", "4", "--clip-grad", "0.5", "--no-bias-dropout-fusion"], save, data) == 0
    lines = [record["text"] for record in events_of(save, "line")]
    told = next(text for text in lines if text.startswith("settings that differ"))
    assert "--clip-grad is 0.5 and was 1.0" in told and "--no-bias-dropout-fusion is True and was False" in told
    assert "data-path" not in told and "lr-scheduler" not in told and len(events_of(save, "step_done")) == 4


@pytest.mark.parametrize(("tail", "is_kept"), [('{"event": "line", "te', False), ('{"event": "whole"}', True)])
def test_a_log_whose_last_line_was_cut_short_holds_whole_lines_again(
    tail: str, is_kept: bool, save: Path, data: Path
) -> None:
    log = save / "log.jsonl"
    before = log.read_text()
    log.write_text(before + tail)
    with Lease(save) as other:
        other.take(print)
        assert "another job writes there" in refusal(save, data, kind="OwnedError")
        assert log.read_text() == before + tail, "it is another job's"
    assert run_on(1, [*FEW, "--train-iters", "4"], save, data) == 0
    after = log.read_text()
    assert after.startswith(f"{before}{tail}\n" if is_kept else before)
    assert all(isinstance(json.loads(line), dict) for line in after.splitlines())


def test_settings_of_a_checkpoint_that_cannot_be_read_are_not_compared(data: Path, tmp_path: Path) -> None:
    def spoil(rank: int) -> None:
        setattr(run_state, "as_toml", lambda run: '[checkpoint]\nsave = "\\udcff"\n')  # noqa: B010

    save = tmp_path / "spoilt"
    assert run_on(1, [*FEW[:-1], "--train-iters", "2"], save, data, before=spoil) == 0
    assert run_on(1, [*FEW, "--train-iters", "4"], save, data) == 0
    lines = [record["text"] for record in events_of(save, "line")]
    (told,) = [text for text in lines if text.startswith("settings that differ")]
    assert "what cannot be compared (the checkpoint's settings: is not valid TOML" in told and " and was " not in told


def test_swapped_data_is_refused_unless_it_is_allowed_and_then_told(save: Path, data: Path, kept: Path) -> None:
    write_other(data, kept / "bytes_document")
    said = refusal(save, data)
    assert "the data bytes_document was another than moved is now (idx_sha256" in said
    assert "--allow-changed-data" in said
    assert run_on(1, [*FEW, "--train-iters", "4", "--allow-changed-data"], save, data) == 0
    assert any("--allow-changed-data: the run goes on although the data bytes_document" in t for t in warnings_of(save))


def test_another_seed_and_another_split_are_refused_together(save: Path, data: Path) -> None:
    said = refusal(save, data, "--seed", "5", "--split", "90,10,0")
    assert "--seed was 1234 and is 5" in said and "--split was 969, 30, 1 and is 90,10,0" in said


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_run_may_start_from_a_checkpoint_that_is_not_the_newest(save: Path, data: Path, tmp_path: Path) -> None:
    words = [*FEW, "--train-iters", "4"]
    assert run_on(1, words, save, data) == 0
    earlier = save / "checkpoints" / "step-0000002"
    assert run_on(1, [*words, "--load", str(earlier)], tmp_path / "other", data) == 0
    (loaded,) = events_of(tmp_path / "other", "checkpoint_loaded")
    assert loaded["step"] == 2
    steps = {folder: events_of(folder, "step_done")[-2:] for folder in (save, tmp_path / "other")}
    assert [step["losses"] for step in steps[save]] == [step["losses"] for step in steps[tmp_path / "other"]]
    (end,) = watch_ranks(
        lambda rank: run_rank(
            rank,
            world_size=1,
            words=[
                *MODEL,
                "--data-path",
                str(data),
                "--save",
                str(tmp_path / "third"),
                *words,
                "--load",
                f"{earlier}3",
            ],
            before=None,
        ),
        1,
    )
    assert "is not a directory" in end.error


@pytest.mark.parametrize("owes", [True, False], ids=["owes an evaluation", "owes nothing"])
def test_a_run_that_was_over_where_it_is_loaded_from_is_saved_in_its_own_directory(
    save: Path, data: Path, tmp_path: Path, owes: bool
) -> None:
    file = save / "checkpoints" / "step-0000002" / "index.json"
    index = parse(file, file.read_bytes())
    assert index.state["owes"]
    if not owes:  # as one that was converted
        file.write_bytes(render(replace(index, state={**index.state, "owes": None})))
    words = [*FEW, "--train-iters", "2", "--load", str(save)]
    for times in (1, 2):
        assert run_on(1, words, tmp_path / "other", data) == 0
        assert len(events_of(tmp_path / "other", "checkpoint_saved")) == 1, times
    before, after = weights_of(save), weights_of(tmp_path / "other")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_the_time_between_another_run_and_this_one_was_no_interruption(save: Path, data: Path, tmp_path: Path) -> None:
    assert run_on(1, [*FEW, "--train-iters", "4", "--load", str(save)], tmp_path / "other", data) == 0
    (ended,) = events_of(tmp_path / "other", "run_ended")
    assert ended["spent"]["step"] > 0 and ended["spent"]["interrupted"] == 0


def test_what_is_refused_leaves_run_file_and_tokenizer_as_they_are(save: Path, data: Path, tmp_path: Path) -> None:
    before = contents_of(save)
    words = ("--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", str(write_vocabulary(tmp_path)))
    said = refusal(save, data, *words)
    one, other = re.findall(r"the tokenizer is one with digest (\w{12}), and the checkpoint's is one with (.*)", said)[
        0
    ]
    assert other.startswith("digest ") and one not in other and f"whose files are in {save / 'tokenizer'}" in other
    after = contents_of(save)
    assert any(name.startswith("tokenizer") for name in after) and "run.toml" in after
    assert {name for name in before if before[name] != after[name]} == {"log.jsonl"}


def test_what_ends_before_training_writes_nothing(save: Path, data: Path, tmp_path: Path) -> None:
    before = contents_of(save)
    words = ["--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", str(write_vocabulary(tmp_path))]
    assert run_on(1, [*FEW, "--train-iters", "4", *words, "--exit-before-training"], save, data) == 0
    assert contents_of(save) == before


def test_a_model_does_not_meet_another_tokenizer(save: Path, tmp_path: Path) -> None:
    shutil.rmtree(save / "tokenizer")
    vocabulary = write_vocabulary(tmp_path)
    load_tokenizer("BertWordPieceLowerCase", vocab_file=str(vocabulary)).save(save / "tokenizer")
    with pytest.raises(ValueError, match=r"of step 2 was trained with another tokenizer than .*BertWordPieceLowerCase"):
        open_trained(str(save), step=None, device="cpu")


def test_a_fine_tuning_may_have_other_data(save: Path, data: Path, kept: Path, tmp_path: Path) -> None:
    write_other(data, kept / "bytes_document")
    words = [*FEW, "--train-iters", "1", "--load", str(save), "--finetune", "--seed", "9"]
    assert run_on(1, words, tmp_path / "tuned", data) == 0


def record_for(prefix: Path, *, vocab_size: int = 257, largest: int = 256, digest: str | None = None) -> None:
    tokenizer = load_tokenizer("ByteLevelTokenizer")
    described = {"type": tokenizer.name, "vocab_size": vocab_size, "digest": digest or tokenizer.digest}
    write_record(prefix, {"megalith": "0", "tokenizer": described}, largest_token=largest)


def test_a_start_checks_what_was_recorded_of_the_data(save: Path, data: Path) -> None:
    record_for(data, digest="0" * 64)
    assert "moved.bin: tokenizer: expected the run's" in refusal(save, data)
    record_for(data, largest=264)
    assert "largest token: expected one of the vocabulary, 0 to 263, found 264" in refusal(save, data)
    record_for(data)
    content = bytearray(Path(f"{data}.bin").read_bytes())
    content[0] ^= 1
    Path(f"{data}.bin").write_bytes(content)
    assert "moved.bin: SHA-256: expected" in refusal(save, data, "--verify-data")


def test_an_evaluation_refuses_tokens_of_another_tokenizer(save: Path, data: Path, kept: Path) -> None:
    assert measure(str(save), split=None, files=[str(data)], step=None, device="cpu")["tokens"] > 100
    record_for(data, digest="0" * 64)
    with pytest.raises(ValueError, match=r"moved\.bin: tokenizer: expected the run's"):
        measure(str(save), split=None, files=[str(data)], step=None, device="cpu")


def test_verified_data_is_told(save: Path, data: Path) -> None:
    record_for(data)
    assert run_on(1, [*FEW, "--train-iters", "3", "--verify-data"], save, data) == 0
    lines = [record["text"] for record in events_of(save, "line")]
    assert any(text.startswith(f"--verify-data: {data}: ") and "are as recorded" in text for text in lines)


def test_a_part_that_gets_no_document_is_told_or_refused(save: Path, data: Path, tmp_path: Path) -> None:
    words = [*FEW, "--train-iters", "1", "--eval-iters", "1", "--split", "999,1,0"]
    assert run_on(1, words, tmp_path / "new", data) == 0
    assert any("the share for validation is less than one document" in text for text in warnings_of(tmp_path / "new"))
    assert "leaves no document for training" in refusal(tmp_path / "other", data, "--split", "0,1,1")


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[], [], []], "the 3 documents that --split = 100,0,0 leaves for train hold no token"),
        ([[5]], "--max-epochs = 20: .* has 1 tokens for train and would be read 513 times"),
        ([], "leaves no document for training"),
    ],
    ids=["only empty documents", "one token", "no document"],
)
def test_data_without_tokens_is_refused_at_once(documents: list[list[int]], message: str, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "corpus", np.uint16) as writer:
        for document in documents:
            writer.add_document([document])
    words = ["--split", "100,0,0", "--max-epochs", "20"]
    said = refusal(tmp_path / "run", tmp_path / "corpus", *words)
    assert re.search(message, said), said


def test_a_checkpoint_that_records_neither_data_nor_samples_is_not_compared() -> None:
    data = [{"name": "a", "idx_sha256": "1", "bin_size": 1}]
    samples = decisive(Run(), contrasted=None)
    check_same_samples(Run(), data, samples, {"step": 1})
    with io.StringIO() as stream, RunLog("reference", stream) as log:
        tell_differences(Run(), data, samples, {"step": 1}, {}, log)
        assert stream.getvalue() == ""


@pytest.mark.parametrize("kind", ["data", "seed", "model"])
def test_a_refusal_of_another_run_opens_no_file_of_tensors(
    kind: str, save: Path, data: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large run's files take minutes to verify; its index says at once that the run is another."""
    opened: list[Path] = []
    opening = Disk.open

    def noting(disk: Disk, path: Path) -> int:
        opened.append(path)
        return opening(disk, path)

    def names_opened() -> list[str]:
        return [path.name for path in opened if path.is_relative_to(save / "checkpoints")]

    monkeypatch.setattr(Disk, "open", noting)
    if kind == "data":
        write_other(data, kept / "bytes_document")
    words = {"data": [], "seed": ["--seed", "5"], "model": ["--num-layers", "3"]}[kind]
    words = [*MODEL, "--data-path", str(data), "--save", str(save), *FEW, "--train-iters", "4", *words]

    def on_rank(rank: int) -> tuple[str, list[str]]:
        try:
            run_rank(rank, world_size=1, words=words, before=None)
        except ValueError as refused:
            return str(refused), names_opened()
        return "", names_opened()

    (end,) = watch_ranks(on_rank, 1)
    said, names = end.value
    assert f"of {'another model' if kind == 'model' else 'a run on other samples'}: " in said
    assert "index.json" in names and not any("safetensors" in name for name in names)
    # What is looked at sees the files of a run that does go on.
    goes_on = [*MODEL, "--data-path", str(kept / "bytes_document"), "--save", str(save), *FEW, "--train-iters", "2"]

    def unhindered(rank: int) -> list[str]:
        run_rank(rank, world_size=1, words=goes_on, before=None)
        return names_opened()

    (end,) = watch_ranks(unhindered, 1)
    assert "rank-00000.safetensors" in end.value


@pytest.mark.parametrize("num_steps", [6, pytest.param(51, marks=pytest.mark.slow)])
def test_a_run_in_as_many_pieces_as_steps_is_the_run_in_one(num_steps: int, data: Path, tmp_path: Path) -> None:
    words = [*FEW[:-1], "--train-iters", str(num_steps)]
    assert run_on(1, words, tmp_path / "one", data) == 0
    for _ in range(num_steps + 1):  # the last start finds a finished run
        assert run_on(1, [*words, "--exit-interval", "1"], tmp_path / "pieces", data) == 0
    ours, theirs = (
        [(step["step"], step["losses"], step["grad_norm"]) for step in events_of(tmp_path / name, "step_done")]
        for name in ("pieces", "one")
    )
    assert ours == theirs and len(ours) == num_steps
    pieces, one = weights_of(tmp_path / "pieces"), weights_of(tmp_path / "one")
    assert pieces.keys() == one.keys() and all(torch.equal(pieces[name], one[name]) for name in one)


@pytest.mark.parametrize("name", ["MemoryError", "a host's", "a device's"])
def test_a_run_without_memory_ends_in_a_sentence_and_its_last_commit_is_whole(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*arguments: object, **settings: object) -> None:
        if name == "MemoryError":
            bytearray(1 << 60)
        if name == "a host's":
            torch.empty(1 << 50)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    words = ["pretrain", *MODEL, "--data-path", str(data), "--save", str(tmp_path / "run"), *FEW[2:-1]]
    words += ["--train-iters", "4", "--eval-interval", "3", "--eval-iters", "1"]

    def on_rank(rank: int) -> tuple[int, str]:
        monkeypatch.setattr("megalith.evaluations.evaluate", exhaust)
        for variable, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr("sys.stdout", io.StringIO())
        errors = io.StringIO()
        monkeypatch.setattr("sys.stderr", errors)
        return main(words), errors.getvalue()

    (end,) = watch_ranks(on_rank, 1)
    status, said = end.value
    assert status == OUT_OF_MEMORY and said.startswith("megalith: out of memory: ") and "Traceback" not in said
    assert verify_all([str(tmp_path / "run")], vocab_size=None, as_json=False) == 0
    assert list_checkpoints(tmp_path / "run")[-1].step == 2


def test_every_setting_that_decides_is_a_known_one() -> None:
    known = known_settings()
    assert set(DECIDE_SAMPLES) <= set(known) and set(CHANGE_NOTHING) <= set(known)
    assert not set(DECIDE_SAMPLES) & set(CHANGE_NOTHING)
    assert all(known[name].part in PARTS for name in (*DECIDE_SAMPLES, *CHANGE_NOTHING))
    state: Any = decisive(Run(), contrasted=8)
    assert json.loads(json.dumps(state)) == state and state["contrasted"] == 8


def test_what_another_task_uses_decides_nothing() -> None:
    of_gpt, of_t5 = (decisive(replace(Run(), task=task), contrasted=None) for task in ("gpt", "t5"))
    assert "decoder_seq_length" in of_t5 and "decoder_seq_length" not in of_gpt
    assert "contrasted" not in of_gpt


def test_another_number_of_compared_pairs_is_refused() -> None:
    run = replace(Run(), task="ict")
    state = {"step": 3, "samples": decisive(run, contrasted=8)}
    check_same_samples(run, [], decisive(run, contrasted=8), state)
    with pytest.raises(ValueError, match="a loss compared 8 pairs and would compare 16"):
        check_same_samples(run, [], decisive(run, contrasted=16), state)

"""`megalith verify` finds what is wrong with token files and run directories, and nothing where nothing is."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalith.cli import main
from megalith.data.prepare import PrepareConfig, prepare
from megalith.files import Disk
from megalith.verify import Finding, check_checkpoint
from tests.layouts.runs import run_on, write_data


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of two checkpoints, and the token file of the run."""
    folder = tmp_path_factory.mktemp("kept")
    words = "--train-iters 2 --save-interval 1 --eval-iters 0 --lr-warmup-iters 0".split()
    assert run_on(1, words, folder / "run", write_data(folder)) == 0
    return folder


@pytest.fixture
def run(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept / "run", tmp_path / "run"))


def verified(capsys: pytest.CaptureFixture[str], *paths: object, words: tuple[str, ...] = ()) -> tuple[int, Any]:
    """Exit status and JSON of the command; it says no more than that and takes no time."""
    began = time.process_time()
    status = main(["verify", *map(str, paths), "--json", *words])
    assert time.process_time() - began < 3
    return status, json.loads(capsys.readouterr().out)


def faults_of(report: Any) -> list[str]:
    return [fault for finding in report["findings"] for fault in finding["faults"]]


def test_a_whole_run_directory_is_sound(run: Path, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = verified(capsys, run, kept / "bytes_document", run / "checkpoints" / "step-0000001")
    assert (status, report["sound"], faults_of(report)) == (0, True, [])
    kinds = [finding["kind"] for finding in report["findings"]]
    assert kinds == ["run file", "tokenizer", "checkpoint", "checkpoint", "token file", "checkpoint"]
    data = report["findings"][2]["facts"]["data"]
    assert [entry["name"] for entry in data] == ["bytes_document"]


def test_each_shard_is_opened_for_its_digest_and_for_its_tensors(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    open_file = Disk.open

    def noting(disk: Disk, path: Path) -> int:
        opened.append(path.name)
        return open_file(disk, path)

    monkeypatch.setattr(Disk, "open", noting)
    assert not check_checkpoint(run / "checkpoints" / "step-0000002").faults
    assert sorted(opened) == ["index.json", "rank-00000.safetensors", "rank-00000.safetensors"]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit of a shard": (lambda step: flip(step / "rank-00000.safetensors", -9), "rank-00000.safetensors"),
    "a flipped bit of an index": (lambda step: flip(step / "index.json", 99), "index.json"),
    "a missing shard": (lambda step: (step / "rank-00000.safetensors").unlink(), "/rank-00000.safetensors is missing"),
    "a cut shard": (lambda step: (step / "rank-00000.safetensors").write_bytes(b"1"), "rank-00000.safetensors"),
    "a missing index": (lambda step: (step / "index.json").unlink(), "/index.json is missing"),
    "another step's name": (lambda step: step.rename(step.with_name("step-0000007")), "step-0000007"),
    "a changed run file": (lambda step: flip(step.parent.parent / "run.toml", 3), "run.toml"),
    "no run file": (lambda step: (step.parent.parent / "run.toml").unlink(), "run.toml"),
    "a tokenizer without its manifest": (
        lambda step: next((step.parent.parent / "tokenizer").glob("*.json")).unlink(),
        "tokenizer",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_a_run_directory_is_named(run: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, name = DAMAGES[damage]
    change(run / "checkpoints" / "step-0000002")
    status, report = verified(capsys, run)
    assert (status, report["sound"], len(faults_of(report))) == (1, False, 1)
    assert name in faults_of(report)[0]


def test_people_are_told_in_lines_that_do_nothing_to_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a\x1b[31m name"
    folder.mkdir()
    write_data(folder)
    assert main(["verify", str(folder / "bytes_document")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b[31m name/bytes_document: 60 documents" in out
    (line,) = Finding("checkpoint", folder, facts={"files": 1, "tensors": 2}).lines()
    assert line.endswith(": 1 file, 2 tensors")
    assert "nothing was recorded of it" in out


def test_a_vocabulary_can_be_given(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verified(capsys, kept / "bytes_document", words=("--vocab-size", "257"))[0] == 0
    status, report = verified(capsys, kept / "bytes_document", words=("--vocab-size", "256"))
    assert status == 1 and "token 256 at position" in faults_of(report)[0]


def test_digests_that_were_recorded_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("some text of no matter\n")
    config = PrepareConfig(
        input=(str(tmp_path / "in.txt"),), output_prefix=str(tmp_path / "out"), tokenizer_type="ByteLevelTokenizer"
    )
    prefix = prepare(config, quiet=True).sets[0].prefix
    assert verified(capsys, prefix)[0] == 0
    flip(Path(f"{prefix}.bin"), 2)
    status, report = verified(capsys, prefix)
    assert status == 1 and f"{prefix}.bin: SHA-256: expected" in faults_of(report)[0]


@pytest.mark.parametrize("words", [["nowhere"], ["."], ["--vocab-size", "x", "a"], []])
def test_what_cannot_be_verified_is_said_in_a_sentence(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["verify", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("megalith: ") and not captured.out

"""Checkpoints on one rank: what is saved is loaded, what is damaged is refused by name, nothing else is touched."""

import errno
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from megalith.checkpoint import verify as verify_module
from megalith.checkpoint.directory import CheckpointError, list_checkpoints, try_run_directory
from megalith.checkpoint.index import Index
from megalith.checkpoint.pieces import Piece, whole
from megalith.checkpoint.shards import DamagedError
from megalith.checkpoint.store import load_latest, save
from megalith.checkpoint.verify import read_index, verify
from megalith.files import DISK
from tests.checkpoint.runs import assert_equal, empty, load_newest, names_in, pieces_of, save_step, tensors_at
from tests.disks import HookedDisk, Moment, failing_disk


def test_the_newest_checkpoint_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    for step in (9, 10, 2):
        assert save_step(tmp_path, step) == tmp_path / "checkpoints" / f"step-{step:07d}"
    loaded = load_newest(tmp_path)
    assert loaded is not None and loaded.index.step == 10 and loaded.messages() == []
    assert [found.step for found in list_checkpoints(tmp_path)] == [2, 9, 10]
    assert names_in(tmp_path) == ["step-0000002", "step-0000009", "step-0000010"]
    assert verify(loaded.path) == loaded.index == read_index(loaded.path)


def test_a_step_can_be_asked_for(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    tensors = empty()
    loaded = load_latest(tmp_path, pieces_of(tensors), step=1)
    assert loaded is not None and loaded.index.step == 1
    assert_equal(tensors, tensors_at(1))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; it has \[1, 2\]"):
        load_latest(tmp_path, pieces_of(tensors), step=3)


def test_every_number_type_comes_back_into_parameters_and_strided_tensors(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    saved = {
        "weight": whole(layer.weight),
        "half": whole(torch.randn(4, 4).bfloat16()),
        "flags": whole(torch.tensor([True, False])),
        "count": whole(torch.tensor(2**53 + 1)),
        "nothing": whole(torch.zeros(0, 3)),
        "nan": whole(torch.tensor([float("nan"), -0.0, float("inf")])),
    }
    save(tmp_path, 0, saved, {})
    other = nn.Linear(3, 2)
    read = {name: torch.zeros_like(piece.local) for name, piece in saved.items()}
    read["half"] = torch.zeros(4, 8).bfloat16()[:, ::2]
    load_latest(tmp_path, {**{name: whole(tensor) for name, tensor in read.items()}, "weight": whole(other.weight)})
    assert torch.equal(other.weight, layer.weight) and other.weight.requires_grad
    assert torch.equal(read["half"], saved["half"].local) and torch.equal(read["flags"], saved["flags"].local)
    assert int(read["count"]) == 2**53 + 1
    assert torch.equal(read["nan"].view(torch.int32), saved["nan"].local.view(torch.int32))


def test_the_caller_may_choose_what_to_load_once_it_has_seen_the_index(tmp_path: Path) -> None:
    save_step(tmp_path, 3)
    made: dict[str, torch.Tensor] = {}

    def weights(index: Index) -> dict[str, Piece]:
        for name, stored in index.tensors.items():
            if name.startswith("model."):
                made[name] = torch.empty(stored.shape)
        return {name: whole(tensor) for name, tensor in made.items()}

    load_latest(tmp_path, weights, may_stay_unread=lambda name: not name.startswith("model."))
    assert_equal(made, {name: tensor for name, tensor in tensors_at(3).items() if name.startswith("model.")})


def test_another_models_checkpoint_is_refused_with_the_differences(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    wanted = pieces_of(empty())
    with pytest.raises(ValueError, match="the run has no count") as raised:
        load_latest(tmp_path, {name: piece for name, piece in wanted.items() if name != "count"})
    assert "step-0000001 does not fit this run" in str(raised.value)
    with pytest.raises(ValueError, match="it has no more"):
        load_latest(tmp_path, {**wanted, "more": whole(torch.zeros(1))})
    with pytest.raises(ValueError, match=r"count is F32 \(\) in it, but F64 \(\) in this run"):
        load_latest(tmp_path, {**wanted, "count": whole(torch.zeros(()).double())})
    with pytest.raises(ValueError, match=r"model.bias is F32 \(5,\) in it, but F32 \(6,\)"):
        load_latest(tmp_path, {**wanted, "model.bias": whole(torch.zeros(6))})


def test_the_index_of_another_run_is_damage_and_a_whole_checkpoint_of_another_run_is_not(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, run in ((ours, "ours"), (theirs, "theirs")):
        for step in (1, 2):
            save(folder, step, pieces_of(tensors_at(step if run == "ours" else step + 7)), {"run": run})

    def wanted(index: Index) -> dict[str, Piece]:
        if index.state["run"] != "ours":
            raise ValueError(f"it is of {index.state['run']}")
        return pieces_of(empty())

    newest = ours / "checkpoints" / "step-0000002"
    shutil.copy(theirs / "checkpoints" / "step-0000002" / "index.json", newest)
    loaded = load_latest(ours, wanted)
    assert loaded is not None and loaded.index.step == 1
    assert "step-0000002 is damaged and was not used" in loaded.messages()[0]
    # Without one that could be used instead, or whole: refused by name, as what it is.
    with pytest.raises(ValueError, match=r"step-0000002 is refused: it is of theirs"):
        load_latest(theirs, wanted)
    shutil.rmtree(newest)
    shutil.copytree(theirs / "checkpoints" / "step-0000002", newest)
    with pytest.raises(ValueError, match=r"step-0000002 is refused: it is of theirs"):
        load_latest(ours, wanted)


def test_an_equal_checkpoint_of_the_step_stays_and_a_different_one_is_never_overwritten(tmp_path: Path) -> None:
    path = save(tmp_path, 1, pieces_of(tensors_at(1)), {"consumed_samples": 8}, notes={"seconds": 1})
    before = {file.name: file.stat().st_ino for file in path.iterdir()}
    assert save(tmp_path, 1, pieces_of(tensors_at(1)), {"consumed_samples": 8}, notes={"seconds": 2}) == path
    assert {file.name: file.stat().st_ino for file in path.iterdir()} == before
    with pytest.raises(CheckpointError, match="step-0000001 exists and holds another checkpoint"):
        save(tmp_path, 1, pieces_of(tensors_at(1)), {"consumed_samples": 16})
    with pytest.raises(CheckpointError, match="holds another checkpoint"):
        save(tmp_path, 1, pieces_of(tensors_at(2)), {"consumed_samples": 8})
    assert names_in(tmp_path) == ["step-0000001"]
    assert load_newest(tmp_path) is not None


def test_a_damaged_checkpoint_of_the_step_is_replaced(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    (path / "rank-00000.safetensors").write_bytes(b"x")
    save_step(tmp_path, 1)
    assert names_in(tmp_path) == ["step-0000001"]
    assert load_newest(tmp_path) is not None


def test_what_is_in_the_way_and_not_ours_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "index.json").write_text("mine")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-0000001").symlink_to(precious)
    (tmp_path / "run" / "checkpoints" / "step-0000002").write_text("a file")
    for step in (1, 2):
        with pytest.raises(CheckpointError, match="in the way"):
            save_step(tmp_path / "run", step)
    assert (precious / "index.json").read_text() == "mine"
    # Nor is a run begun anew beside it.
    with pytest.raises(CheckpointError, match=r"step-0000002 is not a directory; .*step-0000001 is a link"):
        load_newest(tmp_path / "run")


def test_a_newest_checkpoint_that_is_a_link_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    newest = save_step(tmp_path, 2)
    newest.rename(tmp_path / "moved")
    newest.symlink_to(tmp_path / "moved")
    loaded = load_newest(tmp_path)
    assert loaded is not None and loaded.index.step == 1
    assert loaded.messages() == [
        f"{newest} is damaged and was not used: rank 0: {newest} is a link, which is not followed",
        "going on from step 1 instead: 1 step is lost and done again",
    ]


def corrupt(path: Path, how: str) -> None:
    """Damage a checkpoint."""
    shard = path / "rank-00000.safetensors"
    data = shard.read_bytes()
    if how == "truncated":
        shard.write_bytes(data[:-1])
    elif how == "appended":
        shard.write_bytes(data + b"\0")
    elif how == "zeroed":
        shard.write_bytes(bytes(len(data)))
    elif how == "missing":
        shard.unlink()
    elif how == "directory":
        shard.unlink()
        shard.mkdir()
    elif how == "pipe":
        shard.unlink()
        os.mkfifo(shard)
    elif how == "link":
        shard.rename(path / "elsewhere")
        shard.symlink_to(path / "elsewhere")
    elif how == "of another step":
        shutil.copy(path.with_name("step-0000001") / shard.name, shard)
    elif how == "no index":
        (path / "index.json").unlink()
    elif how == "empty index":
        (path / "index.json").write_bytes(b"")
    elif how == "index of another step":
        shutil.copy(path.with_name("step-0000001") / "index.json", path / "index.json")
    elif how == "copy of another step":
        shutil.rmtree(path)
        shutil.copytree(path.with_name("step-0000001"), path)
    elif how == "empty":
        shutil.rmtree(path)
        path.mkdir()
    elif how == "writable for everybody":
        path.chmod(0o777)
    else:
        raise ValueError(how)


DAMAGES = (
    "truncated, appended, zeroed, missing, directory, pipe, link, of another step, no index, empty index, "
    "index of another step, copy of another step, empty, writable for everybody"
).split(", ")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(tmp_path: Path, how: str) -> None:
    save_step(tmp_path, 1)
    path = save_step(tmp_path, 4)
    corrupt(path, how)
    with pytest.raises((DamagedError, OSError), match="step-0000004"):
        verify(path)
    loaded = load_newest(tmp_path)
    assert loaded is not None and loaded.index.step == 1
    said = loaded.messages()
    assert len(said) == 2 and str(path) in said[0] and "is damaged and was not used" in said[0]
    assert said[1] == "going on from step 1 instead: 3 steps are lost and done again"
    shutil.rmtree(tmp_path / "checkpoints" / "step-0000001")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: step-0000004"):
        load_newest(tmp_path)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE])
def test_a_checkpoint_that_may_not_be_read_is_neither_damaged_nor_passed_over_nor_replaced(
    tmp_path: Path, code: int
) -> None:
    save_step(tmp_path, 1)
    path = save_step(tmp_path, 4)

    def forbid(moment: Moment, operation: str, opened: Path) -> None:
        if moment == "before" and operation == "open" and opened == path / "rank-00000.safetensors":
            raise OSError(code, os.strerror(code), str(opened))

    with pytest.raises(CheckpointError, match=f"^{path} cannot be read \\({os.strerror(code)}\\): ") as raised:
        load_latest(tmp_path, pieces_of(empty()), disk=HookedDisk(forbid))
    assert str(raised.value).endswith("permissions" if code in (errno.EACCES, errno.EPERM) else ")")
    with pytest.raises(CheckpointError, match=r"step-0000004 was not written: .*rank-00000\.safetensors"):
        save(tmp_path, 4, pieces_of(tensors_at(5)), {"consumed_samples": 40}, disk=HookedDisk(forbid))
    loaded = load_newest(tmp_path)
    assert loaded is not None and loaded.index.step == 4
    assert names_in(tmp_path) == ["step-0000001", "step-0000004"]


def test_files_of_others_do_no_harm(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    (path / ".DS_Store").write_text("")
    for name in ("step-1", "step-00000002", "step-x", "step-0000002.bak", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    loaded = load_newest(tmp_path)
    assert loaded is not None and loaded.index.step == 1


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def flipped_outcomes(tmp_path: Path, count: int) -> list[bool]:
    """Flip single bits all over a checkpoint, one at a time; for each whether it was refused rather than loaded."""
    path = save_step(tmp_path, 1)
    files = sorted(path.iterdir())
    outcomes = []
    for number in range(count):
        file = files[number % len(files)]
        bit = random.randrange(8 * file.stat().st_size)
        flip(file, bit)
        try:
            load_latest(tmp_path, pieces_of(empty()))
            outcomes.append(False)
        except CheckpointError as refused:
            assert file.name in str(refused)
            outcomes.append(True)
        flip(file, bit)
    assert load_newest(tmp_path) is not None
    return outcomes


def test_of_400_flipped_bits_every_one_is_refused_by_file_name(tmp_path: Path) -> None:
    random.seed(5)
    assert flipped_outcomes(tmp_path, 400) == [True] * 400


def test_the_flips_would_be_noticed_if_they_were_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The test above must be able to fail: without the digests of the files it does.
    random.seed(5)
    monkeypatch.setattr(verify_module, "check_files", lambda *args, **named: None)
    assert flipped_outcomes(tmp_path, 40).count(False) > 5


def test_a_leftover_of_a_killed_save_is_removed_but_for_what_others_put_there(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    for name in (".tmp-step-0000002.0123abcd", ".del-step-0000003.0123abcd", ".tmp-step-0000004.0123abcd"):
        (folder / name).mkdir()
        (folder / name / "rank-00000.safetensors").write_text("half")
        (folder / name / ".rank-00001.safetensors.0123abcd.tmp").write_text("half")
    (folder / ".tmp-step-0000004.0123abcd" / "thesis.txt").write_text("precious")
    (folder / ".tmp-step-5").mkdir()
    precious = tmp_path / "elsewhere"
    precious.mkdir()
    (precious / "index.json").write_text("precious")
    (folder / ".tmp-step-0000006.0123abcd").symlink_to(precious)
    save_step(tmp_path, 2)
    assert names_in(tmp_path) == [
        ".del-step-0000004.0123abcd",
        ".tmp-step-0000006.0123abcd",
        ".tmp-step-5",
        "step-0000001",
        "step-0000002",
    ]
    assert os.listdir(folder / ".del-step-0000004.0123abcd") == ["thesis.txt"]
    assert (precious / "index.json").read_text() == "precious"


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="state of the checkpoint"):
        save(tmp_path, 1, pieces_of(tensors_at(1)), {"loss": float("nan")})
    with pytest.raises(ValueError, match="hold 2 of 4"):
        save(tmp_path, 1, {"w": Piece(torch.zeros(2), (4,), (0,))}, {})
    with pytest.raises(ValueError, match="tensor name"):
        save(tmp_path, 1, {"../w": whole(torch.zeros(2))}, {})
    with pytest.raises(ValueError, match="step=-1 must be"):
        save(tmp_path, -1, pieces_of(tensors_at(1)), {})
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_directory_is_tried_before_it_is_needed(tmp_path: Path) -> None:
    try_run_directory(tmp_path / "new" / "run", disk=DISK)
    assert names_in(tmp_path / "new" / "run") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        try_run_directory(tmp_path / "file", disk=DISK)
    number = 0
    while True:
        try:
            try_run_directory(tmp_path / "run", disk=failing_disk(number, errno.EROFS))
            break
        except CheckpointError as error:
            assert "Read-only file system" in str(error) and str(tmp_path / "run" / "checkpoints") in str(error)
        number += 1
    assert number > 10
    save_step(tmp_path / "run", 1)
    assert names_in(tmp_path / "run") == ["step-0000001"]
    (tmp_path / "run" / "checkpoints").chmod(0o777)
    with pytest.raises(CheckpointError, match=r"can be written by everybody.*chmod o-w"):
        try_run_directory(tmp_path / "run", disk=DISK)


def test_nothing_is_executed_or_unpickled_while_loading(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    for name in (".metadata", "rank-00000.pt", "model_optim_rng.pt", "latest_checkpointed_iteration.txt"):
        (path / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "canary").encode() + b"'\ntR.")
    read, write = os.pipe()
    # In a process of its own, as an audit hook stays for ever.
    if os.fork() == 0:
        try:
            sys.addaudithook(lambda event, arguments: os.write(write, event.encode() + b"\n") and None)
            load_newest(tmp_path)
            os.write(write, b"loaded\n")
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as events:
        seen = events.read().split("\n")
    assert "open" in seen and seen[-2] == "loaded"
    assert not {"pickle.find_class", "exec", "compile", "os.system", "subprocess.Popen", "import"} & set(seen)
    assert not (tmp_path / "canary").exists()


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    before = len(os.listdir("/proc/self/fd"))
    for step in range(2, 12):
        save_step(tmp_path, step)
        load_newest(tmp_path)
    corrupt(tmp_path / "checkpoints" / "step-0000011", "truncated")
    load_newest(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before

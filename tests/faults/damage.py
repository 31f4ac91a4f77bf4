"""Damaged checkpoints: each is refused by the name of the file, or the one before it is used and the loss is told."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalith.checkpoint.directory import CheckpointError, step_name
from megalith.checkpoint.index import INDEX_NAME, Index
from megalith.checkpoint.pieces import TORCH_DTYPES, Piece, whole
from megalith.checkpoint.shards import LENGTH_BYTES
from megalith.checkpoint.store import Loaded, load_latest
from tests.faults.cases import Case, Trial, forked
from tests.faults.judge import Outcome, WrongError, check_finished, steps_done_again, warnings_in
from tests.faults.twin import SAVE_INTERVAL, Twin

PAGE = 4096
REFUSED, NOT_SAVED = 2, 74


class Scene(NamedTuple):
    """A run that has finished, of which the newest checkpoint is to be damaged."""

    save: Path
    step: int
    twin: Twin

    @property
    def newest(self) -> Path:
        return self.save / "checkpoints" / step_name(self.step)

    @property
    def shards(self) -> list[str]:
        return sorted(path.name for path in self.newest.glob("*.safetensors"))


def set_scene(twin: Twin, folder: Path, *, alone: bool = False) -> Scene:
    """A copy of the twin's run. alone: there is no earlier checkpoint."""
    save = folder / ("alone" if alone else "run")
    shutil.copytree(twin.folder / "all", save)
    step = twin.scenario.last_step
    if alone:
        for path in (save / "checkpoints").iterdir():
            if path.name != step_name(step):
                shutil.rmtree(path)
    return Scene(save, step, twin)


# Damages the newest checkpoint, and gives the name that a message must contain; empty if no harm was done.
Damage = Callable[[Scene, random.Random], str]


def cut(scene: Scene, draw: random.Random, *, name: str | None = None, to: int | None = None) -> str:
    path = scene.newest / (name or draw.choice(scene.shards))
    size = path.stat().st_size
    os.truncate(path, draw.randrange(size) if to is None else to % size)
    return path.name


def append(scene: Scene, draw: random.Random, *, name: str | None = None) -> str:
    path = scene.newest / (name or draw.choice(scene.shards))
    with path.open("ab") as file:
        file.write(draw.randbytes(draw.randint(1, PAGE)))
    return path.name


def zero(scene: Scene, draw: random.Random, *, name: str | None = None) -> str:
    """A page of zeros, or what there is of one: as a disk gives that has lost a block."""
    path = scene.newest / (name or draw.choice(scene.shards))
    content = bytearray(path.read_bytes())
    begin = draw.randrange(0, len(content), PAGE)
    before, content[begin : begin + PAGE] = content[begin : begin + PAGE], bytes(len(content[begin : begin + PAGE]))
    path.write_bytes(content)
    return path.name if any(before) else ""


def swap(scene: Scene, draw: random.Random) -> str:
    first, second = (scene.newest / name for name in draw.sample(scene.shards, 2))
    first_content, second_content = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_content)
    second.write_bytes(first_content)
    return ".safetensors"


def replace(scene: Scene, draw: random.Random, *, by: str, name: str | None = None) -> str:
    """A file takes the place of the one of that name: from the checkpoint before, or from that of another run."""
    path = scene.newest / (name or draw.choice(scene.shards))
    folder, step = ("other", scene.step) if by == "another run" else ("all", scene.step - SAVE_INTERVAL)
    shutil.copyfile(scene.twin.folder / folder / "checkpoints" / step_name(step) / path.name, path)
    # Which of the two is the wrong one cannot be known.
    return step_name(scene.step) if name == INDEX_NAME else path.name


def remove(scene: Scene, draw: random.Random, *, name: str | None = None) -> str:
    path = scene.newest / (name or draw.choice(scene.shards))
    path.unlink()
    return path.name


def become(scene: Scene, draw: random.Random, *, kind: str, name: str | None = None) -> str:
    """What should be a file is another thing."""
    path = scene.newest / (name or draw.choice(scene.shards))
    path.rename(scene.save / "moved")
    if kind == "link":
        path.symlink_to(scene.save / "moved")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    return path.name


def extra(scene: Scene, draw: random.Random) -> str:
    """A file that no index lists changes nothing."""
    (scene.newest / "rank-00099.safetensors").write_bytes(draw.randbytes(100))
    (scene.newest / "notes.txt").write_text("somebody's")
    return ""


def rename(scene: Scene, draw: random.Random) -> str:
    later = scene.newest.with_name(step_name(scene.step + SAVE_INTERVAL))
    scene.newest.rename(later)
    return f"{later.name}/{INDEX_NAME}"


def empty(scene: Scene, draw: random.Random) -> str:
    shutil.rmtree(scene.newest)
    scene.newest.mkdir()
    return scene.newest.name


def link_directory(scene: Scene, draw: random.Random) -> str:
    scene.newest.rename(scene.save / "moved")
    scene.newest.symlink_to(scene.save / "moved")
    return scene.newest.name


def open_to_all(scene: Scene, draw: random.Random) -> str:
    scene.newest.chmod(0o777)
    return scene.newest.name


DAMAGES: dict[str, Damage] = {
    "shard cut anywhere": cut,
    "shard cut to nothing": partial(cut, to=0),
    "shard cut inside its length": partial(cut, to=LENGTH_BYTES - 1),
    "shard cut inside its header": partial(cut, to=100),
    "shard without its last byte": partial(cut, to=-1),
    "index cut anywhere": partial(cut, name=INDEX_NAME),
    "index cut to nothing": partial(cut, name=INDEX_NAME, to=0),
    "index without its last byte": partial(cut, name=INDEX_NAME, to=-1),
    "shard with more behind": append,
    "index with more behind": partial(append, name=INDEX_NAME),
    "page of a shard zeroed": zero,
    "page of the index zeroed": partial(zero, name=INDEX_NAME),
    "two shards swapped": swap,
    "shard of an earlier step": partial(replace, by="an earlier step"),
    "shard of another run": partial(replace, by="another run"),
    "index of an earlier step": partial(replace, by="an earlier step", name=INDEX_NAME),
    "index of another run": partial(replace, by="another run", name=INDEX_NAME),
    "shard missing": remove,
    "index missing": partial(remove, name=INDEX_NAME),
    "shard is a link": partial(become, kind="link"),
    "shard is a pipe": partial(become, kind="pipe"),
    "shard is a directory": partial(become, kind="directory"),
    "index is a link": partial(become, kind="link", name=INDEX_NAME),
    "index is a pipe": partial(become, kind="pipe", name=INDEX_NAME),
    "files that nobody listed": extra,
    "directory under a later step's name": rename,
    "empty directory": empty,
    "directory is a link": link_directory,
    "directory that everybody may write to": open_to_all,
}


def damages_for(twin: Twin) -> dict[str, Damage]:
    """Those that can be done to this layout's checkpoints."""
    return {name: damage for name, damage in DAMAGES.items() if twin.scenario.world_size > 1 or damage is not swap}


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file, in place."""
    with path.open("r+b", buffering=0) as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def some_bit(path: Path, draw: random.Random) -> tuple[str, int]:
    """A region of a checkpoint's file, each as likely as any other, and one of its bits."""
    size = path.stat().st_size
    if path.name == INDEX_NAME:
        regions = {"start": (0, 100), "middle": (100, size - 100), "end": (size - 100, size)}
    else:
        with path.open("rb") as file:
            header_end = LENGTH_BYTES + int.from_bytes(file.read(LENGTH_BYTES), "little")
        regions = {"length": (0, LENGTH_BYTES), "header": (LENGTH_BYTES, header_end), "elements": (header_end, size)}
    region = draw.choice(sorted(regions))
    return region, draw.randrange(8 * regions[region][0], 8 * regions[region][1])


def bit_flips(trial: Trial, count: int, seed: int, *, per_case: int = 250) -> list[Case]:
    """Single bits turned in every region of every file, and the checkpoint loaded; a quarter without an earlier one."""
    name = f"{trial.twin.scenario.name}: bit flips"
    return [
        Case(f"{name} {seed}-{begin}", partial(_flipped, trial, name, min(per_case, count - begin), f"{seed}-{begin}"))
        for begin in range(0, count, per_case)
    ]


def _flipped(trial: Trial, name: str, count: int, seed: str, folder: Path) -> Iterator[Outcome]:
    def work() -> Iterator[Outcome]:
        draw = random.Random(seed)
        twin = trial.twin
        scenes = {alone: set_scene(twin, folder, alone=alone) for alone in (False, True)}
        wanted = Tensors(twin, scenes[False])
        for _ in range(count):
            alone = draw.random() < 0.25
            scene = scenes[alone]
            file = draw.choice([INDEX_NAME, *scene.shards])
            region, bit = some_bit(scene.newest / file, draw)
            flip(scene.newest / file, bit)
            yield wanted.judge(f"{name}, bit {bit} of {file} ({region}){', alone' * alone}", scene, file, alone=alone)
            flip(scene.newest / file, bit)

    yield from forked(work, trial.mutate)


def damages_loaded(trial: Trial, seed: int, *, rounds: int = 1) -> list[Case]:
    """Each other damage done, and the checkpoint loaded: with an earlier one, and alone."""
    name = f"{trial.twin.scenario.name}: damaged"
    return [
        Case(f"{name} {seed}-{number}", partial(_damaged, trial, name, f"{seed}-{number}")) for number in range(rounds)
    ]


def _damaged(trial: Trial, name: str, seed: str, folder: Path) -> Iterator[Outcome]:
    def work() -> Iterator[Outcome]:
        draw = random.Random(seed)
        wanted: Tensors | None = None
        for kind, damage in damages_for(trial.twin).items():
            for alone in (False, True):
                scene = set_scene(trial.twin, folder, alone=alone)
                wanted = wanted or Tensors(trial.twin, scene)
                file = damage(scene, draw)
                yield wanted.judge(f"{name}, {kind}{', alone' * alone}", scene, file, alone=alone)
                shutil.rmtree(scene.save)

    yield from forked(work, trial.mutate)


class Tensors:
    """What a run's checkpoints hold, to compare with what is loaded."""

    def __init__(self, twin: Twin, scene: Scene) -> None:
        self._twin = twin
        self._loaded: dict[str, Tensor] = {}
        self._wanted: dict[int, dict[str, Tensor]] = {}
        for step in (scene.step, scene.step - SAVE_INTERVAL):
            assert self._load(twin.folder / "all", step=step) is not None
            self._wanted[step] = {name: tensor.clone() for name, tensor in self._loaded.items()}

    def judge(self, name: str, scene: Scene, file: str, *, alone: bool) -> Outcome:
        """Load the newest checkpoint; file: what was damaged, empty if nothing that matters was."""
        try:
            loaded = self._load(scene.save)
        except CheckpointError as error:
            if alone and file and file in str(error):
                return Outcome(name, "refused")
            return Outcome(name, "failure", f"refused: {error}")
        if loaded is None:
            return Outcome(name, "failure", "nothing was found: the run would start anew")
        step = loaded.index.step
        same = loaded.index.same_contents(self._twin.indices[step]) and all(
            torch.equal(self._loaded[tensor], wanted) for tensor, wanted in self._wanted.get(step, {}).items()
        )
        if not same or step not in self._wanted:
            return Outcome(name, "failure", f"loaded as step {step}, but changed")
        if not file:
            told = step == scene.step and not loaded.messages()
            return Outcome(name, "finished-identical") if told else Outcome(name, "failure", str(loaded.messages()))
        messages = loaded.messages()
        told = (
            any(file in text and "was not used" in text for text in messages) and "lost and done again" in messages[-1]
        )
        if step != scene.step - SAVE_INTERVAL or not told:
            return Outcome(name, "failure", f"step {step} was loaded, with the words {messages}")
        return Outcome(name, "recovered")

    def _load(self, save: Path, *, step: int | None = None) -> Loaded | None:
        def everything(index: Index) -> dict[str, Piece]:
            for name, stored in index.tensors.items():
                if name not in self._loaded:
                    self._loaded[name] = torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype])
                self._loaded[name].fill_(0)
            return {name: whole(tensor) for name, tensor in self._loaded.items()}

        return load_latest(save, everything, step=step)


def damages_met(trial: Trial, seed: int) -> list[Case]:
    """Each damage met by the command itself: with an earlier checkpoint it goes on from that, else it refuses."""
    cases = []
    for kind, damage in {**damages_for(trial.twin), "a bit": _flip_one}.items():
        for alone in (False, True):
            name = f"{trial.twin.scenario.name}: a start finds {kind}{', alone' * alone}"
            cases.append(Case(name, partial(_met, trial, name, damage, alone, seed)))
    return cases


def _flip_one(scene: Scene, draw: random.Random) -> str:
    file = draw.choice([INDEX_NAME, *scene.shards])
    flip(scene.newest / file, some_bit(scene.newest / file, draw)[1])
    return file


def _met(trial: Trial, name: str, damage: Damage, alone: bool, seed: int, folder: Path) -> Iterator[Outcome]:
    scene = set_scene(trial.twin, folder, alone=alone)
    file = damage(scene, random.Random(f"{seed} {name}"))
    ended = trial.start(scene.save)
    if alone and file:
        if ended.status != REFUSED or file not in ended.said:
            raise WrongError(f"not refused by the name of {file}: status {ended.status}: {ended.said}")
        yield Outcome(name, "refused")
        return
    if (
        ended.status == NOT_SAVED
        and scene.newest.is_symlink()
        and any("move it away" in t for t in warnings_in(scene.save))
    ):
        # A link is nobody's to remove but its owner's.
        scene.newest.unlink()
        ended = trial.start(scene.save)
    if ended.status != 0:
        raise WrongError(f"status {ended.status}: {ended.said}")
    # What claims to be a step that this run does not reach is never replaced.
    shutil.rmtree(scene.newest.with_name(step_name(scene.step + SAVE_INTERVAL)), ignore_errors=True)
    check_finished(trial.twin, scene.save)
    told: list[Any] = [text for text in warnings_in(scene.save) if "was not used" in text]
    if not file:
        if told:
            raise WrongError(f"it was said that something is lost: {told}")
        yield Outcome(name, "finished-identical")
    elif any(file in text for text in told):
        yield Outcome(name, "recovered", redone=steps_done_again(scene.save))
    else:
        raise WrongError(f"nobody said that {file} is damaged: {told}")

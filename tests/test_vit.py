"""The task vit: its faults, its operations, fine-tuning, evaluation, and the program for Megatron-LM's scripts."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalith.check import check
from megalith.cli import main
from megalith.models.vit import VisionTransformer, resized_positions
from megalith.sources import read_command_line
from megalith.tasks.vit import step_flops
from megalith.trained_images import measure_images
from tests.images import CLASSES, write_images
from tests.layouts.runs import Runs, events_of, largest_difference, steps_of, weights_of
from tests.layouts.test_vit import MODEL
from tests.operations import make_countable

TP, PP, SHARD = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--data-parallel-sharding"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("vit"), model=MODEL, write=write_images)


@pytest.fixture(scope="module")
def other_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, for fine-tuning."""
    return write_images(tmp_path_factory.mktemp("other"), classes=("star", "square"))


FINETUNED = "--finetune --num-classes 2 --img-dim 20 --seq-length 25 --max-position-embeddings 26".split()


def faults_of(*words: str) -> list[str]:
    return [str(fault) for fault in check(read_command_line([*MODEL, *words]), 1)]


def test_a_run_without_faults_has_none(runs: Runs) -> None:
    assert faults_of("--data-path", str(runs.data)) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--patch-dim 5", "--img-dim = 12: is not divisible by --patch-dim = 5. Nearest that are: [10, 15]."),
        ("--num-channels 2", "--num-channels = 2: must be 3 (colour) or 1 (grey). Give one of them."),
        ("--num-classes 10", "--num-classes = 10: does not fit DATA, which has 3 classes. Give --num-classes 3."),
        ("--data-path DATA DATA", "--data-path = DATA DATA: has 2 words; a vit has one folder"),
        ("--data-path DATA/train", "--data-path = DATA/train: has no folder train and no folder val"),
        ("--corpus python --save x", "--corpus = python: is no data for vit. Use --corpus shapes."),
        ("--context-parallel-size 2", "--context-parallel-size = 2: cuts the sequence of a gpt"),
        ("--image-augmentation some", "--image-augmentation = some: must be one of all, crop, none."),
    ],
)
def test_faults_are_named_with_a_remedy(words: str, said: str, runs: Runs) -> None:
    data = str(runs.data)
    given = words.replace("DATA", data).split()
    place = [] if "--data-path" in given or "--corpus" in given else ["--data-path", data]
    try:
        faults = faults_of(*place, *given)
    except ValueError as error:
        faults = str(error).splitlines()
    assert any(fault.startswith(said.replace("DATA", data)) for fault in faults), faults


def test_shapes_are_images_of_eight_classes_and_no_text() -> None:
    faults = faults_of("--corpus", "shapes", "--save", "x")
    assert faults == ["--num-classes = 3: does not fit --corpus shapes, which has 8 classes. Give --num-classes 8."]
    gpt = read_command_line(["gpt", *MODEL[1:], "--corpus", "shapes", "--save", "x"])
    assert "--corpus = shapes: is no data for gpt. Use --corpus python." in [str(fault) for fault in check(gpt, 1)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_places_that_do_not_come_out_even_are_refused(size: int, runs: Runs) -> None:
    words = [*MODEL, "--data-path", str(runs.data), TP, str(size), "--sequence-parallel", "--num-attention-heads", "6"]
    words += ["--hidden-size", "36", "--micro-batch-size", "1"]
    faults = [str(fault) for fault in check(read_command_line(words), size)]
    assert len(faults) == (1 if size == 3 else 0)
    assert all("--sequence-parallel: cuts 10 places (patches and class token) over 3" in fault for fault in faults)


def test_without_pillow_the_remedy_is_the_extra(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalith.check_vit.has_pillow", lambda: False)
    assert any("pip install 'megalith[vision]'" in fault for fault in faults_of("--data-path", str(runs.data)))


@pytest.mark.parametrize("finetune", [False, True])
def test_operations_are_those_that_pytorch_counts(finetune: bool) -> None:
    words = "--attention-dropout 0 --hidden-dropout 0 --ffn-hidden-size 40 --kv-channels 6 --img-dim 16".split()
    run = read_command_line([*MODEL, *words])
    run = replace(run, checkpoint=replace(run.checkpoint, finetune=finetune))
    model = VisionTransformer(run.model, finetune=finetune).to_empty(device="cpu")
    make_countable(model)
    images = torch.zeros(5, 16, 16, 3, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        losses = model(images, labels=torch.zeros(5, dtype=torch.int64), loss_weights=torch.ones(5))
        losses.sum().backward()
    # It leaves out the two products of a vector of labels with one of weights.
    assert counter.get_total_flops() == pytest.approx(step_flops(run, 0, 5), rel=1e-3)


def finetuned(save: Path, data: Path, pretrained: Path, world_size: int, *words: str) -> int:
    from tests.layouts.runs import run_on

    words = (*FINETUNED, "--load", str(pretrained), *words)
    return run_on(world_size, words, save, data, model=MODEL)


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "zero1": (2, [SHARD, "optimizer"]),
    "zero3": (2, [SHARD, "parameters"]),
    "tp2-pp2": (4, [TP, "2", PP, "2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fine_tuning_takes_over_the_weights_under_every_layout(
    layout: str, runs: Runs, other_images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and layout == "zero3":
        pytest.skip("run with --slow")
    pretrained = runs(1)
    world_size, words = LAYOUTS[layout]
    # A step without learning leaves the weights as they began.
    still = ["--lr", "0", "--train-iters", "1", "--lr-warmup-iters", "0", "--hidden-dropout", "0"]
    assert finetuned(tmp_path / "run", other_images, pretrained, world_size, *still, *words) == 0
    before, after = weights_of(pretrained), weights_of(tmp_path / "run")
    for name, weight in after.items():
        if not name.startswith("weight."):
            continue
        if name.startswith("weight.finetuning_head."):
            assert not weight.any() and len(weight) == 2
        elif name == "weight.position_embedding.weight":
            assert torch.equal(weight, resized_positions(before[name], 26))
        else:
            assert torch.equal(weight, before[name]), name
    assert not any("pretraining_head" in name for name in after)
    # The head has no opinion yet.
    assert steps_of(tmp_path / "run")[0]["losses"]["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_an_interrupted_fine_tuning_goes_on_from_its_own_weights(
    runs: Runs, other_images: Path, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert finetuned(whole, other_images, runs(1), 1) == 0
    assert finetuned(stopped, other_images, runs(1), 1, "--exit-interval", "10") == 0
    assert len(steps_of(stopped)) == 10
    assert finetuned(stopped, other_images, runs(1), 1) == 0
    assert largest_difference(whole, stopped) == 0.0
    assert [s["losses"] for s in steps_of(whole)] == [s["losses"] for s in steps_of(stopped)]


def test_another_image_size_without_finetune_is_another_model(
    runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*MODEL, "--data-path", str(runs.data), "--save", str(tmp_path / "run"), "--load", str(runs(1))]
    assert main(["pretrain", *words, "--img-dim", "24"]) == 2
    assert "img_dim is 12 in the checkpoint and 24 in this run" in capfd.readouterr().err


def test_evaluate_gives_the_accuracy_of_the_whole_validation_folder(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Three evaluations of four images each see all twelve once.
    save = runs(1, "--eval-iters", "3", "--global-batch-size", "4", "--eval-interval", "100")
    last = events_of(save, "evaluated")[-1]["losses"]
    found = measure_images(str(save), split=None, files=(), step=None, device="cpu")
    assert (found["images"], found["step"], found["data"]) == (12, 20, "valid")
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert found["accuracy"] == pytest.approx(last["accuracy"])
    assert main(["evaluate", str(save), "--split", "train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 36
    # A folder of some of the classes, each under its own number.
    shutil.copytree(runs.data / "val" / CLASSES[2], tmp_path / CLASSES[2])
    some = measure_images(str(save), split=None, files=(str(tmp_path),), step=None, device="cpu")
    assert some["images"] == 4
    assert main(["evaluate", str(save), "--split", "test"]) == 2
    assert "images have no such part" in capsys.readouterr().err


def test_evaluate_counts_the_classes_as_the_checkpoint_does(
    runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = write_images(tmp_path)
    kept = shutil.copytree(root / "val", tmp_path / "kept")
    save = tmp_path / "run"
    assert runs.go_on(1, ["--data-path", str(root), "--train-iters", "4", "--eval-iters", "0"], save) == 0

    def evaluated(*words: str) -> dict[str, float] | str:
        status = main(["evaluate", str(save), "--json", "--device", "cpu", *words])
        told = capfd.readouterr()
        if status:
            assert status == 2
            return told.err
        found = json.loads(told.out)
        return {figure: found[figure] for figure in ("images", "loss", "accuracy")}

    whole = evaluated()
    shutil.rmtree(kept / "cross")
    some = evaluated("--file", str(kept))
    assert whole != some and evaluated("--file", str(root / "val")) == whole
    shutil.copytree(root / "val" / "cross", kept / "dagger")
    assert str(evaluated("--file", str(kept))).startswith(f"megalith: {kept}/dagger: is a class that the training")
    shutil.rmtree(kept / "dagger")
    # Named anew, the classes would have other numbers.
    for part in ("train", "val"):
        (root / part / "circle").rename(root / part / "oval")
    for words in ([], ["--file", str(root / "val")], ["--file", str(kept)]):
        said = f"{root}/train: has other classes than the 3 that the model of step 4 was trained on."
        assert said in str(evaluated(*words))
    for part in ("train", "val"):
        (root / part / "oval").rename(root / part / "circle")
    # Without the training images all classes of the others say what they are called, and a part of them does not.
    (root / "train").rename(tmp_path / "gone")
    assert evaluated() == whole == evaluated("--file", str(root / "val"))
    said = f"{root}/train: is gone, and {kept} does not have just the 3 classes that the model of step 4 was trained on"
    assert said in str(evaluated("--file", str(kept)))
    assert f"{tmp_path}/nowhere: is not a directory. Correct --file." in str(evaluated("--file", f"{tmp_path}/nowhere"))
    assert f"{root}/train: is not a directory. Restore it, or give --file." in str(evaluated("--split", "train"))


def test_a_damaged_image_stops_the_run_by_its_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = write_images(tmp_path, trained=3)
    (data / "train" / "ring" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert main(["pretrain", *MODEL, "--data-path", str(data)]) == 2
    assert re.search(r"megalith: .*train/ring/1\.png: cannot be read as an image", capfd.readouterr().err)


def test_the_flags_of_megatrons_program_train_two_steps(tmp_path: Path) -> None:
    words = """
        --num-layers 2 --hidden-size 16 --num-attention-heads 2 --img-dim 16 --patch-dim 8 --num-classes 3
        --micro-batch-size 2 --global-batch-size 4 --seq-length 4 --max-position-embeddings 4 --train-iters 2
        --lr-decay-iters 2 --lr 0.00015 --min-lr 1.0e-5 --lr-decay-style cosine --weight-decay 0.05 --clip-grad 1.0
        --log-interval 1 --eval-interval 1000 --eval-iters 1 --fp16 --initial-loss-scale 128 --num-workers 2
        --init-method-xavier-uniform --no-query-key-layer-scaling
    """.split()
    command = [sys.executable, "-m", "megalith.pretrain_vit", *words, "--data-path", str(write_images(tmp_path))]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    # A mean of 0 is not printed, as in Megatron-LM: the accuracy may be missing.
    pattern = r"^ iteration +([12])/ +2 \|.* loss: (\d\.\d+E\+\d+) \|( accuracy: \d\.\d+E[+-]\d+ \|)? loss scale"
    steps = re.findall(pattern, done.stdout, re.MULTILINE)
    assert [number for number, _, _ in steps] == ["1", "2"], done.stdout
    assert all(0.5 < float(loss) < 2.0 for _, loss, _ in steps)
    assert "building VIT model ..." in done.stdout and "> finished creating VIT datasets ..." in done.stdout


@pytest.mark.slow
def test_the_preset_learns_and_tells_what_chance_would_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megalith.data.shapes.TRAINED", 40)
    monkeypatch.setattr("megalith.data.shapes.VALIDATED", 8)
    words = "--preset quickstart-vit --train-iters 60 --eval-iters 1 --eval-interval 100 --log-format json --device cpu"
    assert main(["pretrain", *words.split(), "--save", str(tmp_path / "run")]) == 0
    first, last = events_of(tmp_path / "run", "evaluated")
    assert first["losses"]["loss"] > 2.0 and last["losses"]["loss"] < 1.9 < math.log(8)
    assert last["losses"]["accuracy"] > 0.2
    said = capfd.readouterr().out
    assert "validation accuracy: " in said and "chance: 2.079, the loss of guessing among 8 classes" in said
    # A second start finds the images and the run where they are.
    assert main(["pretrain", *words.split(), "--save", str(tmp_path / "run")]) == 0
    assert "drawing a set of images" not in capfd.readouterr().out
    assert measure_images(str(tmp_path / "run"), split=None, files=(), step=None, device="cpu")["images"] == 64

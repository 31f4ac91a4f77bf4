"""`megalith finetune`: files of pairs, what is taken over, layouts, resuming, accuracy; all on files made here."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalith.asked import asked_of_finetune
from megalith.check import check
from megalith.cli import main
from megalith.data.pair_files import LAYOUTS, ClassBatches, Pair, read_pairs
from megalith.data.tokenizer import load_tokenizer
from megalith.finetune import pretrain_words
from megalith.models.bert import Bert
from megalith.sources import read_command_line
from megalith.tasks.classify import TASK, step_flops
from tests.layouts.runs import Runs, assert_same_run, events_of, largest_difference, run_rank, steps_of, weights_of
from tests.layouts.test_bert import MODEL, BertRuns, write_data
from tests.operations import make_countable
from tests.ranks import run_ranks

TP, PP, SHARD = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--data-parallel-sharding"
CLASSES = LAYOUTS["MNLI"].classes


def write_mnli(path: Path, *, count: int, seed: int) -> Path:
    """Pairs whose class is the kind of words in the second sentence."""
    random = np.random.RandomState(seed)
    lines = ["\t".join(f"column{number}" for number in range(12))]
    for number in range(count):
        kind = random.randint(3)
        first = " ".join(f"w{word}" for word in random.randint(40, size=random.randint(2, 12)))
        second = " ".join(f"w{word}" for word in random.randint(10 * kind, 10 * kind + 10, size=5))
        lines.append("\t".join([str(number), *"abcdefg", first, second, "neutral", CLASSES[kind]]))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_qqp(path: Path, *, count: int) -> Path:
    lines = ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"]
    lines += [f"{n}\t{2 * n}\t{2 * n + 1}\tw{n % 40} w1\tw{(n + n % 2) % 40} w1\t{1 - n % 2}" for n in range(count)]
    path.write_text("\r\n".join(lines))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return BertRuns(tmp_path_factory.mktemp("bert"), model=MODEL, write=write_data)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    return write_mnli(folder / "train.tsv", count=330, seed=1), write_mnli(folder / "valid.tsv", count=70, seed=2)


def finetune_words(pretrained: Path, files: tuple[Path, Path], save: Path, *words: str) -> list[str]:
    usual = (
        "--micro-batch-size 16 --global-batch-size 32 --lr 5e-3 --epochs 5 --log-interval 1 --log-params-norm".split()
    )
    train, valid = (str(file) for file in files)
    data = ["--task", "MNLI", "--train-data", train, "--valid-data", valid]
    return [str(pretrained), *data, *usual, "--log-format", "json", "--device", "cpu", "--save", str(save), *words]


def finetune_on(world_size: int, pretrained: Path, files: tuple[Path, Path], save: Path, *words: str) -> Path:
    asked = pretrain_words(asked_of_finetune(finetune_words(pretrained, files, save, *words)))
    assert run_ranks(partial(run_rank, world_size=world_size, words=asked, before=None), world_size) == [0] * world_size
    return save


@pytest.fixture(scope="module")
def finetuned(runs: Runs, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune_on(1, runs(1), files, tmp_path_factory.mktemp("finetuned") / "run")


def test_a_fine_tuning_learns_and_its_accuracy_is_that_of_all_pairs(
    finetuned: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validated = events_of(finetuned, "evaluated")
    # At the start, after each of five epochs of 330 // 32 steps, and at the end.
    assert [event["step"] for event in validated] == [0, 10, 20, 30, 40, 50, 50]
    assert validated[0]["losses"]["loss"] > 0.9 and validated[0]["losses"]["accuracy"] < 0.6
    assert validated[-1]["losses"]["loss"] < 0.7 and validated[-1]["losses"]["accuracy"] > 0.8
    found = evaluated(finetuned, capsys)
    assert (found["pairs"], found["step"]) == (70, 50)
    for figure in ("loss", "accuracy"):
        assert validated[-1]["losses"][figure] == pytest.approx(found[figure], rel=1e-5)
    some = tmp_path / "some.tsv"
    some.write_text("\n".join(files[1].read_text().splitlines()[:65]))
    assert evaluated(finetuned, capsys, "--file", str(some))["pairs"] == 64
    assert main(["evaluate", str(finetuned), "--split", "test"]) == 2
    assert "pairs have no such part" in capsys.readouterr().err


def evaluated(save: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What megalith evaluate tells of a run."""
    assert main(["evaluate", str(save), *words, "--json", "--device", "cpu"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("count", "world_size", "words"),
    [(23, 1, []), (23, 2, []), (70, 2, [PP, "2"])],
    ids=["fewer than a batch", "a replica without a pair", "pp2"],
)
def test_every_validation_measures_all_pairs_once(
    count: int, world_size: int, words: list[str], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_mnli(tmp_path / "train.tsv", count=33, seed=1)
    valid = write_mnli(tmp_path / "valid.tsv", count=count, seed=2)
    # 33 pairs are one step an epoch.
    frozen = ["--lr", "0", "--epochs", "4", *words]
    save = finetune_on(world_size, runs(1), (train, valid), tmp_path / "run", *frozen)
    figures = [tuple(event["losses"].values()) for event in events_of(save, "evaluated")]
    assert len(figures) == 6 and len(set(figures)) == 1
    found = evaluated(save, capsys)
    assert found["pairs"] == count
    assert figures[0] == pytest.approx((found["loss"], found["accuracy"]), rel=1e-5)


def test_validations_are_the_same_while_the_batch_grows(runs: Runs, files: tuple[Path, Path], tmp_path: Path) -> None:
    given = finetune_words(runs(1), files, tmp_path / "run", "--lr", "0", "--eval-interval", "1")
    words = pretrain_words(asked_of_finetune(given))
    length = words.index("--train-iters")
    words[length : length + 2] = ["--train-samples", "80", "--rampup-batch-size", "16", "16", "32"]
    assert main(["pretrain", *words]) == 0
    assert [step["global_batch_size"] for step in steps_of(tmp_path / "run")][::2] == [16, 32]
    assert len({tuple(event["losses"].values()) for event in events_of(tmp_path / "run", "evaluated")}) == 1


def test_fewer_validation_batches_are_the_same_pairs_each_time_and_told(
    runs: Runs, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = finetune_words(runs(1), files, tmp_path / "run", "--lr", "0", "--train-iters", "2", "--eval-interval", "1")
    assert main(["finetune", *words, "--eval-iters", "2"]) == 0
    text = "--eval-iters = 2: validations measure the first 64 of 70 samples. --eval-iters 3 measures all."
    assert text in capsys.readouterr().out
    figures = {tuple(event["losses"].values()) for event in events_of(tmp_path / "run", "evaluated")}
    some = tmp_path / "some.tsv"
    some.write_text("\n".join(files[1].read_text().splitlines()[:65]))
    found = evaluated(tmp_path / "run", capsys, "--file", str(some))
    assert len(figures) == 1
    assert figures.pop() == pytest.approx((found["loss"], found["accuracy"]), rel=1e-5)


def test_all_weights_but_the_head_are_taken_over(runs: Runs, files: tuple[Path, Path], tmp_path: Path) -> None:
    save = finetune_on(1, runs(1), files, tmp_path / "run", "--lr", "0", "--train-iters", "1")
    before, after = weights_of(runs(1)), weights_of(save)
    names = {name for name in after if name.startswith("weight.")}
    assert {name for name in names if not torch.equal(after[name], before.get(name, torch.empty(0)))} == {
        "weight.classification_head.weight",
        "weight.classification_head.bias",
    }
    assert after["weight.classification_head.weight"].shape == (3, 32)
    assert not any("lm_head" in name or "binary_head" in name for name in names)
    assert torch.equal(after["weight.pooler.weight"], before["weight.pooler.weight"])


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        ([], set()),
        (["--bf16"], {"--fp32-residual-connection"}),
        (["--fp16"], {"--fp32-residual-connection", "--fp16-lm-cross-entropy"}),
    ],
)
def test_what_only_16_bits_have_is_taken_over_with_them(
    words: list[str], taken: set[str], runs: Runs, files: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = {"--fp32-residual-connection", "--fp16-lm-cross-entropy"}
    pretrained = runs(1, "--train-iters", "3", "--fp16", *sorted(settings))
    asked = pretrain_words(asked_of_finetune(finetune_words(pretrained, files, tmp_path / "run", *words)))
    assert settings.intersection(asked) == taken
    assert check(read_command_line(asked), 1) == []


def test_a_model_without_binary_head_gets_a_new_pooler(runs: Runs, files: tuple[Path, Path], tmp_path: Path) -> None:
    pretrained = runs(1, "--bert-no-binary-head")
    save = finetune_on(1, pretrained, files, tmp_path / "run", "--lr", "0", "--train-iters", "1")
    after = weights_of(save)
    assert after["weight.pooler.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert not any("token_type" in name for name in after)


@pytest.mark.parametrize(
    ("layout", "world_size", "words"),
    [
        ("dp2", 2, []),
        ("tp2", 2, [TP, "2", "--sequence-parallel"]),
        ("pp2", 2, [PP, "2"]),
        ("zero3", 2, [SHARD, "parameters"]),
        ("dp2-tp2", 4, [TP, "2"]),
    ],
)
def test_the_run_is_the_same_on_every_layout(
    layout: str,
    world_size: int,
    words: list[str],
    finetuned: Path,
    runs: Runs,
    files: tuple[Path, Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if not request.config.getoption("--slow") and layout not in ("dp2", "tp2"):
        pytest.skip("run with --slow")
    # A few steps: what differs grows with each, by learning as fast as here.
    few = ["--train-iters", "6", "--lr", "1e-3"]
    reference = finetune_on(1, runs(1), files, tmp_path / "reference", *few)
    assert_same_run(finetune_on(world_size, runs(1), files, tmp_path / "run", *few, *words), reference)


def test_an_interrupted_fine_tuning_goes_on_bit_for_bit(
    finetuned: Path, runs: Runs, files: tuple[Path, Path], tmp_path: Path
) -> None:
    save = finetune_on(1, runs(1), files, tmp_path / "run", "--exit-interval", "13")
    assert len(steps_of(save)) == 13
    finetune_on(1, runs(1), files, save)
    assert largest_difference(finetuned, save) == 0.0
    assert [step["losses"] for step in steps_of(save)] == [step["losses"] for step in steps_of(finetuned)]


def test_qqp_files_are_read_and_trained_on(runs: Runs, tmp_path: Path) -> None:
    file = write_qqp(tmp_path / "qqp.tsv", count=40)
    pairs = read_pairs([str(file), str(file)], LAYOUTS["QQP"], warn=pytest.fail)
    assert len(pairs) == 80 and pairs[1] == pairs[41] == Pair("w1 w1", "w2 w1", 0)
    words = finetune_words(runs(1), (file, file), tmp_path / "run", "--task", "QQP", "--train-iters", "2")
    assert main(["finetune", *words]) == 0
    assert len(weights_of(tmp_path / "run")["weight.classification_head.bias"]) == 2


def test_lines_of_qqp_that_are_no_pair_are_left_out_and_told(
    runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = write_qqp(tmp_path / "good.tsv", count=40)
    rows = good.read_text().splitlines()
    # As in GLUE's own files: a question that is empty, and a line with a tab too many or cut off.
    bad = {7: "90\t1\t2\tw1\t\t0", 20: "91\t1\t2\t \tw2\t0", 21: "92\t1\t2\tw1\tw2\t0\t0", 43: "93\t1\t2\tw1"}
    for line, row in bad.items():
        rows.insert(line - 1, row)
    file = tmp_path / "some.tsv"
    file.write_text("\n".join(rows))
    told: list[str] = []
    pairs = read_pairs([str(file)], LAYOUTS["QQP"], warn=told.append)
    assert pairs == read_pairs([str(good)], LAYOUTS["QQP"], warn=pytest.fail)
    text = f"{file}: 4 of 44 lines are left out, the first is line 7: the second sentence is empty."
    assert told == [text]
    # A sentence of the command, once for each file.
    words = finetune_words(runs(1), (file, good), tmp_path / "run", "--task", "QQP", "--train-iters", "2")
    assert main(["finetune", *words]) == 0
    assert [warned["text"] for warned in events_of(tmp_path / "run", "warned") if "left out" in warned["text"]] == [
        text
    ]
    capfd.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--file", str(file), "--json", "--device", "cpu"]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["pairs"] == 40 and said.err == f"warning: {text}\n"
    file.write_text("\n".join([rows[0], *bad.values()]))
    with pytest.raises(ValueError, match=r"some\.tsv: none of its 4 lines is a pair, the first is line 2: the second"):
        read_pairs([str(file)], LAYOUTS["QQP"], warn=pytest.fail)


@pytest.mark.parametrize(
    ("layout", "line", "said"),
    [
        ("MNLI", "1\ta\tb", "line 3: expected 11 or more columns with tabs between them, found 3"),
        (
            "MNLI",
            "\t".join([*"01234567", "w1", "w2", "-"]),
            "line 3: expected one of contradiction, entailment, neutral",
        ),
        ("MNLI", "\t".join([*"01234567", "w1", " ", "neutral"]), "line 3: the second sentence is empty"),
        ("QQP", "1\t2\t3\tw1\tw2\tyes", "line 3: expected one of 0, 1 in the last column, found 'yes'"),
    ],
)
def test_a_line_that_is_not_as_its_format_says_is_named(layout: str, line: str, said: str, tmp_path: Path) -> None:
    good = write_qqp(tmp_path / "a", count=1) if layout == "QQP" else write_mnli(tmp_path / "a", count=1, seed=1)
    file = tmp_path / "pairs.tsv"
    file.write_text(good.read_text().strip() + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"pairs.tsv, {said}"):
        read_pairs([str(file)], LAYOUTS[layout], warn=pytest.fail)
    file.write_text("\n".join(good.read_text().split("\n")[1:2] * 2))
    with pytest.raises(ValueError, match=r"pairs\.tsv, line 1: is a pair; put a line with the names of the columns in"):
        read_pairs([str(file)], LAYOUTS[layout], warn=pytest.fail)
    file.write_text("id\tonly a head\n")
    with pytest.raises(ValueError, match="expected a line of column names and lines of pairs, found 1 lines"):
        read_pairs([str(file)], LAYOUTS[layout], warn=pytest.fail)


@pytest.mark.parametrize("length", [24, 8, 5])
def test_a_sample_is_both_sentences_with_special_tokens_cut_at_the_end(length: int, runs: Runs) -> None:
    tokenizer = load_tokenizer("BertWordPieceLowerCase", vocab_file=str(runs.data.parent / "vocab.txt"))
    batches = ClassBatches([Pair("w1 w2 w3", "w4 w5", 1)], tokenizer, length=length)
    batch = {name: array[0].tolist() for name, array in batches.read(np.array([0]), np.array([6])).items()}
    words = {number: tokenizer.encode(f"w{number}")[0] for number in range(1, 6)}
    cls, sep = tokenizer.cls, tokenizer.sep
    whole = [cls, words[1], words[2], words[3], sep, words[4], words[5]]
    tokens = [*whole[: length - 1], sep]
    assert batch["tokens"] == tokens + [tokenizer.pad] * (length - len(tokens))
    types = [0] * min(5, len(tokens) - 1)
    assert batch["types"] == types + [1] * (len(tokens) - len(types)) + [0] * (length - len(tokens))
    assert batch["padding"] == [1] * len(tokens) + [0] * (length - len(tokens))
    assert (batch["classes"], batch["class_mask"], batch["samples"]) == (1, 1.0, 6)


def test_faults_are_named_with_a_remedy(
    runs: Runs, files: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["classify", *MODEL[1:], "--vocab-file", str(runs.data.parent / "vocab.txt")]
    assert [str(fault) for fault in check(read_command_line(words), 1)] == [
        "--pairs-format: is required and was not given. Give MNLI or QQP.",
        "--train-data: is required and was not given. Add --train-data FILE.",
        "--valid-data: is required and was not given. Add --valid-data FILE, or --eval-iters 0.",
    ]
    data = ["--pairs-format", "MNLI", "--train-data", str(files[0]), "--valid-data", "gone.tsv"]
    faults = [str(fault) for fault in check(read_command_line([*words, *data, "--seq-length", "4"]), 1)]
    assert "--valid-data = gone.tsv: is not a file. Correct the path." in faults
    assert "--seq-length = 4: is too short for classify, whose samples need 5. Lengthen it." in faults
    asked = ["--task", "MNLI", "--train-data", str(files[0]), "--valid-data", str(files[1])]
    for given, said in {
        ("nowhere", *asked): "nowhere: is not a run directory",
        (str(runs(1)), *asked, "--epochs", "0"): "--epochs = 0: must be greater than 0",
        (str(runs(1)), *asked, "--learning", "1"): "--learning: is not a known flag",
        (str(runs(1)), "--task", "SST"): "invalid choice: 'SST'",
        (str(runs(1)), *asked, "--hidden-size", "64"): "hidden_size is 32 in the checkpoint and 64 in this run",
    }.items():
        save = ["--save", str(runs.data.parent / "unused"), "--micro-batch-size", "2"]
        assert main(["finetune", *given, *save]) == 2
        assert said in capfd.readouterr().err


def test_a_run_without_validation_pairs_is_measured_on_files_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text('task = "classify"\npairs_format = "MNLI"\ntrain_data = ["pairs"]\n')
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "--split = valid: the run has no pairs for it. Name some: --file FILE." in capsys.readouterr().err


def test_operations_are_those_that_pytorch_counts(runs: Runs, files: tuple[Path, Path]) -> None:
    words = ["classify", *MODEL[1:], "--pairs-format", "MNLI", "--attention-dropout", "0", "--hidden-dropout", "0"]
    run = read_command_line(words)
    model = Bert(run.model, 64, head="classification", num_classes=3)
    make_countable(model)
    tokenizer = load_tokenizer("BertWordPieceLowerCase", vocab_file=str(runs.data.parent / "vocab.txt"))
    source = ClassBatches(read_pairs([str(files[0])], LAYOUTS["MNLI"], warn=pytest.fail), tokenizer, length=24)
    batch = {name: torch.from_numpy(array) for name, array in source.read(np.arange(5), np.arange(5)).items()}
    with FlopCounterMode(display=False) as counter:
        TASK.run_part(model, batch["tokens"], batch).sum().backward()
    assert counter.get_total_flops() == pytest.approx(step_flops(run, 64, 5), rel=1e-3)

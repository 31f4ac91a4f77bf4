"""The task retriever: a bi-encoder goes on with questions and their passages, through megalith finetune."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalith.asked import asked_of_finetune
from megalith.check import check
from megalith.cli import main
from megalith.data.questions import read_training_questions
from megalith.finetune import pretrain_words
from megalith.sources import read_command_line
from megalith.trained_retrieval import open_retriever
from tests.layouts.runs import Runs, assert_same_steps, events_of, largest_difference, run_on, steps_of
from tests.layouts.test_ict import MODEL, SHARD, TITLES, TP, VOCABULARY, assert_same_run, micro, write_texts

QUESTIONS = 24
HARD = 2  # for a question in training


@pytest.fixture(scope="module")
def ict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a tiny bi-encoder, which begins with what it knows from sentences."""
    folder = tmp_path_factory.mktemp("retriever")
    files = ["--titles-data-path", str(folder / TITLES), "--vocab-file", str(folder / "vocab.txt")]
    return Runs(folder, model=[*MODEL, *files, *micro(4), "--retriever-seq-length", "12"], write=write_texts)(1)


def write_questions(path: Path, seed: int) -> Path:
    """Questions of two words that stand in the right passage; some have fewer wrong ones than others."""
    random = np.random.RandomState(seed)

    def passage(words: list[str]) -> dict[str, str]:
        return {"title": words[0], "text": " ".join(words)}

    def some(count: int) -> list[str]:
        return [VOCABULARY[word] for word in random.randint(5, 63, count)]

    entries: list[dict[str, Any]] = []
    for number in range(QUESTIONS):
        asked = some(2)
        entries.append(
            {
                "question": f"{' '.join(asked)}?",
                "positive_ctxs": [passage([*some(2), *asked])],
                "hard_negative_ctxs": [passage([*some(3), asked[0]]) for _ in range(number % 4)],
                "negative_ctxs": [passage(some(5)) for _ in range(number % 3)],
            }
        )
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def words(ict: Path) -> list[str]:
    """The words behind megalith finetune, but for the directory to save to."""
    train, valid = (write_questions(ict.parent / f"{name}.json", seed) for seed, name in enumerate(("train", "valid")))
    files = ["--train-data", str(train), "--valid-data", str(valid)]
    # Word by word those of a run: three epochs of three steps.
    more = "--global-batch-size 8 --lr 1e-3 --train-with-neg --train-hard-neg 2 --log-interval 1 --log-params-norm"
    more += " --val-av-rank-hard-neg 3 --val-av-rank-other-neg 2 --log-format json --device cpu --epochs 3"
    more += " --make-vocab-size-divisible-by 8 --weight-decay 0.1"
    return [str(ict), "--task", "RET-FINETUNE-NQ", *files, *more.split()]


@pytest.fixture(scope="module")
def runs(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The same as words of pretrain."""
    return Runs(
        tmp_path_factory.mktemp("runs"),
        model=pretrain_words(asked_of_finetune(words)),
        write=lambda folder: folder / "none",
    )


def test_the_command_fine_tunes_and_validates_among_wrong_passages(
    ict: Path, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", *words, *micro(4), "--save", str(tmp_path / "run")]) == 0
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 9 and list(steps[0]["losses"]) == ["loss", "rank", "top1_acc", "top3_acc"]
    assert all(1 <= step["losses"]["rank"] <= 12 for step in steps)
    first, last = events_of(tmp_path / "run", "evaluated")[0], events_of(tmp_path / "run", "evaluated")[-1]
    assert last["losses"]["loss"] < first["losses"]["loss"] and last["losses"]["rank"] < first["losses"]["rank"]
    # The four questions of a microbatch have 1 right passage, 1.5 hard ones and 1 other on average.
    assert "chance: 2.639, the loss of guessing among the 14 passages of a microbatch" in capfd.readouterr().out
    expected = validation_by_definition(ict, Path(words[words.index("--valid-data") + 1]))
    for name, figure in expected.items():
        assert first["losses"][name] == pytest.approx(figure, rel=1e-4), name


@pytest.mark.parametrize("negatives", [[], ["--val-av-rank-hard-neg", "0", "--val-av-rank-other-neg", "0"]])
def test_every_validation_measures_all_questions_once(
    negatives: list[str], ict: Path, words: list[str], tmp_path: Path
) -> None:
    # Of 18 questions the fifth microbatch of four has two, and the sixth, which fills the batch of eight, has none.
    few = tmp_path / "few.json"
    few.write_text(json.dumps(json.loads(Path(words[words.index("--valid-data") + 1]).read_text())[:18]))
    more = ["--valid-data", str(few), "--lr", "0", *micro(4), *negatives, "--save", str(tmp_path / "run")]
    assert main(["finetune", *words, *more]) == 0
    figures = [event["losses"] for event in events_of(tmp_path / "run", "evaluated")]
    assert len(figures) == 5 and all(those == figures[0] for those in figures)
    hard, others = (0, 0) if negatives else (3, 2)
    for name, figure in validation_by_definition(ict, few, hard=hard, others=others).items():
        assert figures[0][name] == pytest.approx(figure, rel=1e-4), name


def validation_by_definition(ict: Path, file: Path, *, hard: int = 3, others: int = 2) -> dict[str, float]:
    """Loss, mean rank and accuracies before the first step, written out: four questions at a time, with the first hard
    and other wrong passages of each."""
    retriever = open_retriever(str(ict), step=None, device="cpu")

    def vector(tower: Any, *parts: str) -> torch.Tensor:
        ids = [2]
        for part in parts:
            ids += [*retriever.tokenizer.encode(part), 3]
        ids = ids if len(ids) <= 12 else [*ids[:11], 3]
        return torch.as_tensor(tower(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))[0]).double()

    losses, ranks = [], []
    questions = read_training_questions([file])
    with torch.no_grad():
        for first in range(0, len(questions), 4):
            asked = questions[first : first + 4]
            right = [vector(retriever.model.context, q.positive.title, q.positive.text) for q in asked]
            wrong = [
                vector(retriever.model.context, passage.title, passage.text)
                for q in asked
                for passage in [*q.hard[:hard], *q.others[:others]]
            ]
            for number, question in enumerate(asked):
                scores = torch.stack([*right, *wrong]) @ vector(retriever.model.query, question.text) / 32**0.5
                losses.append(float(scores.logsumexp(0) - scores[number]))
                ranks.append(1 + int((scores > scores[number]).sum()))
    tops = {f"top{k}_acc": 100 * float(np.mean([rank <= k for rank in ranks])) for k in (1, 3)}
    return {"loss": float(np.mean(losses)), "rank": float(np.mean(ranks)), **tops}


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "dp2": (2, micro(2)),
    "tp2": (2, [*micro(4), TP, "2"]),
    "zero3": (2, [*micro(2), SHARD, "parameters"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_run_is_the_same_on_every_layout(layout: str, runs: Runs, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--slow") and layout != "dp2":
        pytest.skip("run with --slow")
    world_size, words = LAYOUTS[layout]
    assert_same_run(runs(world_size, *words), runs(1, *micro(4)))


def test_a_run_goes_on_bit_for_bit(runs: Runs, tmp_path: Path) -> None:
    undisturbed = runs(1, *micro(4))
    # In its second epoch, whose wrong passages are others than those of the first.
    save = runs.copied(runs(1, *micro(4), "--exit-interval", "4"), tmp_path / "run")
    assert runs.go_on(1, micro(4), save) == 0
    assert largest_difference(save, undisturbed) == 0.0
    assert_same_steps(save, undisturbed, loss=0.0, norm=0.0)


def test_faults_are_named_with_a_remedy(words: list[str]) -> None:
    pretraining = [*pretrain_words(asked_of_finetune(words)), *micro(4)]

    def said(*more: str, ranks: int = 1) -> list[str]:
        return [str(fault) for fault in check(read_command_line([*pretraining, *more]), ranks)]

    assert said() == []
    assert said("--train-data", "nowhere") == ["--train-data = nowhere: is not a file. Correct the path."]
    assert said("--train-hard-neg", "0") == [
        "--train-with-neg: adds no passage while --train-hard-neg = 0. Raise that."
    ]
    assert said(*micro(1)) == said(*micro(1), ranks=2) == []
    alone = [word for word in pretraining if word != "--train-with-neg"]
    faults = check(read_command_line([*alone, "--train-hard-neg", "0", *micro(1)]), 1)
    assert [str(fault) for fault in faults] == [
        "--micro-batch-size = 1: leaves a question one passage to choose from, so that there is nothing to learn. "
        "Give 2 or more, more ranks, or wrong passages by --train-with-neg."
    ]
    longer = said("--retriever-seq-length", "17")
    assert longer == ["--retriever-seq-length = 17: is longer than --max-position-embeddings = 16. Shorten it."]
    assert said("--val-av-rank-other-neg", "-1") == [
        "--val-av-rank-other-neg = -1: must not be negative. Give 0 or more."
    ]
    cut = said("--pipeline-model-parallel-size", "2", ranks=2)
    assert any(fault.startswith("--pipeline-model-parallel-size = 2: cuts one stack of layers") for fault in cut)


@pytest.mark.slow
def test_questions_can_follow_a_bert(ict: Path, words: list[str], tmp_path: Path) -> None:
    sizes = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16"
    more = "--micro-batch-size 4 --global-batch-size 4 --lr 1e-3 --train-iters 1 --make-vocab-size-divisible-by 8"
    model = ["bert", *sizes.split(), *more.split(), *"--save-interval 1 --eval-iters 0 --device cpu".split()]
    data = ict.parent / "texts_sentence"
    vocabulary = ["--vocab-file", str(ict.parent / "vocab.txt"), "--log-format", "json"]
    assert run_on(1, vocabulary, tmp_path / "bert", data, model=model) == 0
    begun = pretrain_words(asked_of_finetune([str(tmp_path / "bert"), *words[1:]]))
    assert begun[begun.index("--bert-load") + 1] == str(tmp_path / "bert") and "--load" not in begun
    assert main(["pretrain", *begun, *micro(4), "--save", str(tmp_path / "run")]) == 0
    assert len(steps_of(tmp_path / "run")) == 9

"""The task ict: its faults, its operations, beginning with a BERT, and the program for Megatron-LM's scripts."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalith.check import check
from megalith.cli import main
from megalith.data.indexed import IndexedWriter
from megalith.models.retrieval import Retriever
from megalith.sources import read_command_line
from megalith.tasks.ict import step_flops
from megalith.train import train
from tests.layouts.runs import configured, events_of, run_on, weights_of
from tests.layouts.test_ict import MODEL, SHARED, TITLES, micro, write_texts
from tests.operations import make_countable
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, titles and a vocabulary."""
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder


def data_of(folder: Path) -> list[str]:
    files = ["--titles-data-path", str(folder / TITLES), "--vocab-file", str(folder / "vocab.txt")]
    return ["--data-path", str(folder / "texts_sentence"), *files]


def faults_of(*words: str, ranks: int = 1) -> list[str]:
    return [str(fault) for fault in check(read_command_line([*MODEL, *micro(4), *words]), ranks)]


def test_a_run_without_faults_has_none(folder: Path) -> None:
    assert faults_of(*data_of(folder)) == []
    assert faults_of("--mock-data") == []
    assert faults_of("--corpus", "python", "--save", "x") == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--query-in-block-prob 1.5", "--query-in-block-prob = 1.5: must be from 0 to 1. Give a share."),
        ("--biencoder-projection-dim -1", "--biencoder-projection-dim = -1: must not be negative."),
        ("--retriever-report-topk-accuracies 1 0", "--retriever-report-topk-accuracies = 1 0: takes numbers above 0"),
        ("--retriever-report-topk-accuracies 5 5", "--retriever-report-topk-accuracies = 5 5: takes numbers above 0"),
        ("--bert-load nowhere", "--bert-load = nowhere: is not a directory. Name the run directory of a bert."),
        ("--bert-load . --load ..", "--bert-load = .: contradicts --load: both give weights."),
        (
            "--data-path 1 a 2 b",
            "--data-path = 1 a 2 b: has 4 words; titles belong to the documents of one file, so ict "
            "takes one prefix. Give one; megalith preprocess makes one of several --input.",
        ),
        ("--titles-data-path nowhere", "--titles-data-path = nowhere: is no prefix of a token file (.bin and .idx)."),
        ("--context-parallel-size 2", "--context-parallel-size = 2: cuts the sequence of a gpt"),
        ("--indexer-batch-size 0", "--indexer-batch-size = 0: must be greater than 0."),
        ("--indexer-log-interval 0", "--indexer-log-interval = 0: must be greater than 0."),
        ("--retriever-seq-length 17", "--retriever-seq-length = 17: is longer than --max-position-embeddings = 16."),
        ("--sample-rate 0", "--sample-rate = 0.0: must be above 0 and at most 1."),
    ],
)
def test_faults_are_named_with_a_remedy(words: str, said: str, folder: Path) -> None:
    faults = faults_of(*data_of(folder), *words.split())
    assert any(fault.startswith(said) for fault in faults), faults


def test_a_bert_may_be_named_beside_the_runs_own_directory_however_it_is_written(folder: Path) -> None:
    words = ["--bert-load", str(folder), "--save", f"{folder}/run", "--load", f"{folder}/../{folder.name}/run/"]
    assert not [
        fault for fault in faults_of(*data_of(folder), *words, "--save-interval", "5") if "--bert-load" in fault
    ]


def test_titles_are_asked_for_and_a_pipeline_is_refused(folder: Path) -> None:
    untitled = faults_of("--data-path", "p", "--vocab-file", str(folder / "vocab.txt"))
    assert untitled == [
        "--titles-data-path: is required by ict and was not given. Add --titles-data-path PREFIX, of a file with the "
        "title of each document."
    ]
    cut = faults_of(*data_of(folder), "--pipeline-model-parallel-size", "2", ranks=2)
    assert cut[0].startswith(
        "--pipeline-model-parallel-size = 2: cuts one stack of layers, and a bi-encoder has two that meet in the loss"
    )
    beside = faults_of("--mock-data", "--titles-data-path", "p")
    assert beside == ["--titles-data-path = p: stands beside --mock-data, which brings its own. Leave one out."]


def test_titles_of_other_documents_are_refused(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fewer = tmp_path / "fewer"
    with IndexedWriter(fewer, np.uint16) as writer:
        writer.add_document([[5], [6]])
    said = r"--titles-data-path = .*: "
    for titles, reason in (
        (folder / "texts_sentence", "is the text itself"),
        (fewer, "has 1 titles, and .* has 60 doc"),
    ):
        words = [*data_of(folder), "--titles-data-path", str(titles)]
        assert main(["pretrain", *MODEL, *micro(4), *words]) == 2
        assert re.search(said + reason, capfd.readouterr().err)


def test_a_part_without_documents_or_blocks_is_told(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*MODEL, *micro(4), *data_of(folder), "--train-iters", "1", "--eval-iters", "1", "--lr-warmup-iters", "0"]
    assert main(["pretrain", *words, "--split", "999,1,0"]) == 0
    told = "--split = 999,1,0: the share for validation is less than one document: there is none."
    assert told in capfd.readouterr().out
    for name in ("lonely", "titles"):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            for _ in range(10):
                writer.add_document([[5, 6]])
    words += ["--data-path", str(tmp_path / "lonely"), "--titles-data-path", str(tmp_path / "titles")]
    assert main(["pretrain", *words, "--split", "1,0,0"]) == 2
    said = "lonely, train part: none of the 10 documents has 2 sentences"
    assert f"megalith: {tmp_path}/{said}" in capfd.readouterr().err


def test_a_run_does_not_go_on_with_other_titles(folder: Path, tmp_path: Path) -> None:
    words = [
        *data_of(folder),
        *micro(4),
        "--train-iters",
        "2",
        "--lr-warmup-iters",
        "0",
        "--save",
        str(tmp_path / "run"),
    ]

    def on_rank(rank: int, *more: str) -> str:
        try:
            return str(train(configured(rank, 1, [*MODEL, *words, *more]), started=0.0))
        except ValueError as error:
            return str(error)

    assert run_ranks(on_rank, 1) == ["0"]
    with IndexedWriter(tmp_path / "titles", np.uint16) as writer:
        for number in range(60):
            writer.add_document([[5 + number % 7, 6]])

    def with_others(rank: int) -> str:
        return on_rank(
            rank, "--titles-data-path", str(tmp_path / "titles"), "--train-iters", "3", "--override-lr-scheduler"
        )

    said = run_ranks(with_others, 1)[0]
    assert "is of a run on other samples: the data titles_document was another than titles is now" in said


@pytest.mark.parametrize("width", [0, 8])
def test_operations_are_those_that_pytorch_counts(width: int) -> None:
    words = ["--attention-dropout", "0", "--hidden-dropout", "0", "--biencoder-projection-dim", str(width)]
    run = read_command_line([*MODEL, *words, "--mock-data"])
    model = Retriever(run.model, 64).to_empty(device="cpu")
    make_countable(model)
    queries = torch.ones(5, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        sums = model(
            queries,
            queries[:, None],
            queries_real=queries,
            contexts_real=queries[:, None],
            loss_weights=torch.ones(5),
        )
        sums.sum().backward()
    # Those of the scores, which depend on the replicas, are a thousandth even here.
    assert counter.get_total_flops() == pytest.approx(step_flops(run, 64, 5), rel=2e-3)


def bert_on(folder: Path, *more: str) -> Path:
    """The run directory of a tiny BERT that is trained here."""
    words = """
        bert --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
        --micro-batch-size 4 --global-batch-size 4 --lr 1e-3 --train-iters 2 --make-vocab-size-divisible-by 8
        --save-interval 2 --eval-iters 0 --log-format json --device cpu
    """.split()
    vocabulary = ["--vocab-file", str(folder / "vocab.txt")]
    save = folder / f"bert{len(more)}"
    assert run_on(1, list(more), save, folder / "texts_sentence", model=[*words, *vocabulary]) == 0
    return save


@pytest.fixture(scope="module")
def bert(folder: Path) -> Path:
    return bert_on(folder)


@pytest.mark.parametrize("shared", [False, True])
def test_towers_begin_with_the_encoder_of_a_bert(shared: bool, bert: Path, folder: Path, tmp_path: Path) -> None:
    # A step with a learning rate of nothing leaves them as they began.
    words = [*data_of(folder), *micro(4), "--bert-load", str(bert), "--train-iters", "1", "--lr-warmup-iters", "0"]
    words += ["--save-interval", "1", "--lr", "0", "--save", str(tmp_path / "run"), *([SHARED] if shared else [])]

    def on_rank(rank: int) -> int:
        return main(["pretrain", *MODEL, *words])

    assert run_ranks(on_rank, 1) == [0]
    began, wanted = weights_of(tmp_path / "run"), weights_of(bert)
    towers = ("shared",) if shared else ("query", "context")
    taken = 0
    for tower in towers:
        for name, tensor in began.items():
            prefix = f"weight.towers.{tower}.encoder."
            if name.startswith(prefix):
                assert torch.equal(tensor, wanted[f"weight.{name.removeprefix(prefix)}"]), name
                taken += 1
        assert began[f"weight.towers.{tower}.projection.weight"].abs().max() > 0
    assert taken == 29 * len(towers)
    lines = [record["text"] for record in events_of(tmp_path / "run", "line")]
    assert any(line.startswith(f"began with the weights of step 2 of {bert}") for line in lines)


def test_another_berts_sizes_are_named(bert: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [*data_of(folder), *micro(4), "--bert-load", str(bert)]
    assert main(["pretrain", *MODEL, *words, "--hidden-size", "16", "--num-layers", "1"]) == 2
    said = capfd.readouterr().err
    assert f"--bert-load = {bert}: num_layers is 2 there and 1 in this run; hidden_size is 32 there and 16" in said


def test_a_bert_without_token_types_is_told_by_name(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    headless = bert_on(folder, "--bert-no-binary-head")
    words = [*data_of(folder), *micro(4), "--bert-load", str(headless)]
    assert main(["pretrain", *MODEL, *words]) == 2
    said = f"--bert-load = {headless}: it has no token_type_embedding.weight: it was trained with --bert-no-binary-head"
    assert f"{said}\n" in capfd.readouterr().err


def test_the_flags_of_megatrons_program_train_two_steps(folder: Path) -> None:
    words = """
        --num-layers 2 --hidden-size 16 --num-attention-heads 2 --micro-batch-size 2 --seq-length 16
        --max-position-embeddings 16 --train-iters 2 --lr 0.0001 --num-workers 2 --lr-decay-style linear
        --weight-decay 1e-2 --clip-grad 1.0 --lr-warmup-fraction .01 --fp16 --query-in-block-prob 0.1
        --retriever-report-topk-accuracies 1 2 --retriever-score-scaling --log-interval 1 --eval-iters 1
        --ict-head-size 128 --initial-loss-scale 128 --split 80,10,10
    """.split()
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "megalith.pretrain_ict", *words, *data_of(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    pattern = r"^ iteration +([12])/ +2 \|.* loss: (\d\.\d+E[+-]\d+) \|.*top2_acc: 1\.000000E\+02 \|.*loss scale"
    steps = re.findall(pattern, done.stdout, re.MULTILINE)
    assert [number for number, _ in steps] == ["1", "2"], done.stdout
    assert all(0.3 < float(loss) < 1.2 for _, loss in steps)
    assert "building ICT model ..." in done.stdout and "> finished creating ICT datasets ..." in done.stdout
    assert "note: --ict-head-size is accepted; no program reads it" in done.stdout


@pytest.mark.slow
def test_the_preset_learns_and_tells_what_chance_would_cost(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = "--preset quickstart-ict --train-iters 60 --eval-iters 2 --eval-interval 100 --log-format json --device cpu"
    assert main(["pretrain", *words.split(), "--save", str(tmp_path / "run")]) == 0
    first, last = events_of(tmp_path / "run", "evaluated")[:2]
    assert last["losses"]["loss"] < math.log(64) - 0.2 < first["losses"]["loss"]
    assert "chance: 4.159, the loss of guessing among the 64 passages of a microbatch" in capfd.readouterr().out

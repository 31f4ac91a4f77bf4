"""The task t5: its faults, its operations, blends, made-up data, and the program for Megatron-LM's scripts."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalith.check import check
from megalith.cli import main
from megalith.data.indexed import open_indexed
from megalith.data.masking import Pieces, SpanRule, random_of
from megalith.data.sentence_rows import SentenceRows
from megalith.data.spans import MockSpanRows, SpanBatches, SpanCutRule, SpanRows, cut_spans
from megalith.derived import num_layers
from megalith.models.t5 import T5, num_layers_of
from megalith.sources import read_command_line
from megalith.tasks.t5 import step_flops
from tests.layouts.runs import MODEL as GPT
from tests.layouts.runs import Runs, events_of, steps_of
from tests.layouts.test_t5 import MODEL, ORIGINAL, write_data
from tests.operations import make_countable
from tests.sentences import write_sentences

TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("t5")
    return Runs(folder, model=[*MODEL, "--vocab-file", str(folder / "vocab.txt")], write=write_data)


def faults_of(runs: Runs, *words: str, world_size: int = 1) -> list[str]:
    given = ["--data-path", str(runs.data), "--vocab-file", str(runs.data.parent / "vocab.txt")]
    return [str(fault) for fault in check(read_command_line([*MODEL, *given, *words]), world_size)]


def test_a_run_without_faults_has_none(runs: Runs) -> None:
    assert faults_of(runs) == []
    assert faults_of(runs, *ORIGINAL) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--vocab-extra-ids 0", "--vocab-extra-ids = 0: leaves t5 no token to stand for a span. Give the number"),
        ("--encoder-seq-length 3", "--encoder-seq-length = 3: is too short for a t5, whose samples need 4."),
        (
            "--decoder-seq-length 4",
            "--decoder-seq-length = 4: has no room for the 3 tokens that --mask-prob = 0.15 cuts out of 24. Give at "
            "least 5, better 7, which holds any spans.",
        ),
        ("--decoder-seq-length 30", "--decoder-seq-length = 30: is longer than --max-position-embeddings = 24."),
        ("--mask-prob 0", "--mask-prob = 0.0: must be above 0 and below 1 for t5."),
        (
            "--mask-prob 0.04",
            "--mask-prob = 0.04: of the 22 tokens of text in --encoder-seq-length = 24 is less than one, so none is "
            "ever masked. Give at least 0.046,",
        ),
        ("--short-seq-prob 2", "--short-seq-prob = 2.0: must be from 0 to 1."),
        ("--tokenizer-type ByteLevelTokenizer", "--tokenizer-type = ByteLevelTokenizer: has no tokens to stand for"),
        ("--context-parallel-size 2", "--context-parallel-size = 2: cuts the sequence of a gpt"),
        ("--softmax-scale 0", "--softmax-scale = 0.0: must be above 0."),
        (
            "--position-embedding-type relative --relative-attention-num-buckets 7",
            "--relative-attention-num-buckets = 7: must be even and at least 4",
        ),
        (
            "--position-embedding-type relative --relative-attention-max-distance 16",
            "--relative-attention-max-distance = 16: must be above half of --relative-attention-num-buckets = 32",
        ),
    ],
)
def test_faults_are_named_with_a_remedy(words: str, said: str, runs: Runs) -> None:
    faults = faults_of(runs, *words.split())
    assert any(fault.startswith(said) for fault in faults), faults


def test_lengths_are_required_and_cut_evenly(runs: Runs) -> None:
    where = MODEL.index("--decoder-seq-length")
    given = ["--data-path", str(runs.data), "--vocab-file", str(runs.data.parent / "vocab.txt")]
    without = [*MODEL[:where], *MODEL[where + 2 :], *given]
    assert [str(fault) for fault in check(read_command_line(without), 1)] == [
        "--decoder-seq-length: is required by t5 and was not given. Add --decoder-seq-length."
    ]
    faults = faults_of(runs, "--decoder-seq-length", "11", TP, "2", "--sequence-parallel", world_size=2)
    assert faults == [
        "--decoder-seq-length = 11: is not divisible by --tensor-model-parallel-size = 2, over which "
        "--sequence-parallel cuts it. Nearest lengths: [10, 12]; or leave --sequence-parallel out."
    ]


def test_a_run_counts_the_layers_that_the_model_has() -> None:
    for name, words in (("t5", MODEL), ("gpt", GPT)):
        run = read_command_line(words)
        assert (run.task, num_layers(run)) == (name, 4)
    assert num_layers_of(read_command_line(MODEL).model) == 4


def test_pipelines_share_out_the_layers_of_both_stacks(runs: Runs) -> None:
    assert faults_of(runs, PP, "4", world_size=4) == []
    faults = faults_of(runs, PP, "5", "--micro-batch-size", "1", world_size=5)
    assert faults == [
        "--pipeline-model-parallel-size = 5: is more than the 4 layers, of which each stage needs one. Use at most 4 "
        "stages."
    ]
    relative = ["--position-embedding-type", "relative"]
    assert faults_of(runs, PP, "2", *relative, world_size=2) == []
    faults = faults_of(runs, PP, "4", *relative, world_size=4)
    assert [fault.split(".")[0] for fault in faults] == [
        "--pipeline-model-parallel-size = 4: cuts a stack of layers, all of which share one table of distances"
    ]


def test_the_originals_options_are_those_of_t5_alone() -> None:
    words = "gpt --softmax-scale 1.0 --disable-output-bias --scale-decoder-outputs".split()
    faults = [str(fault) for fault in check(read_command_line(words), 1)]
    assert "--softmax-scale = 1.0: is an option of t5; gpt has none such. Leave it out." in faults
    assert "--disable-output-bias: is an option of t5; gpt has none such. Leave it out." in faults
    assert "--scale-decoder-outputs: is an option of t5; gpt has none such. Leave it out." in faults


@pytest.mark.parametrize("options", [[], ORIGINAL], ids=["megatron", "original"])
def test_operations_are_those_that_pytorch_counts(options: list[str]) -> None:
    words = "--attention-dropout 0 --hidden-dropout 0 --ffn-hidden-size 40 --kv-channels 6".split()
    run = read_command_line([*MODEL, *words, *options])
    model = T5(run.model, 64)
    model.to_empty(device="cpu")
    make_countable(model)
    tokens = torch.ones(5, 24 + 12, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, padding=torch.zeros(5, 24, dtype=torch.int32)).sum().backward()
    assert counter.get_total_flops() == pytest.approx(step_flops(run, 64, 5), rel=1e-3)


def test_blended_files_train_and_another_inner_width_is_another_model(
    runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = write_sentences(tmp_path, name="other_sentence", seed=8)
    words = [*MODEL, "--vocab-file", str(runs.data.parent / "vocab.txt"), "--train-iters", "4", "--save-interval", "4"]
    words += ["--data-path", "0.6", str(runs.data), "0.4", str(other), "--save", str(tmp_path / "run")]
    assert main(["pretrain", *words]) == 0
    assert len(steps_of(tmp_path / "run")) == 4
    assert events_of(tmp_path / "run", "blend_built")[0]["weights"] == pytest.approx([0.6, 0.4])
    capfd.readouterr()
    assert main(["pretrain", *words, "--ffn-hidden-size", "64"]) == 2
    assert "ffn_hidden_size is 128 in the checkpoint and 64 in this run" in capfd.readouterr().err


def test_a_batch_says_what_both_streams_are_and_which_places_count(tmp_path: Path) -> None:
    pieces = Pieces(60, np.ones(60, bool), np.zeros(60, bool))
    rule = SpanCutRule(
        encoder_length=20, decoder_length=12, pieces=pieces, bos=50, eos=51, pad=4, sentinels=range(4),
        masking=SpanRule(0.3, longest=3, geometric=True),
    )  # fmt: skip
    map_rows = np.array([[0, 2, 18], [2, 5, 9], [7, 8, 3]], np.uint32)
    sentences = SentenceRows(open_indexed(write_sentences(tmp_path)), map_rows, seed=3, vocab_size=60)
    batch = SpanBatches(SpanRows(sentences, rule), 20, rule.pad).read(np.array([2, 1, 0]), np.array([7, 8, 9]))
    for number, index in enumerate((2, 1, 0)):
        sample = cut_spans(*sentences.read(index), rule, random_of(3, index))
        assert batch["tokens"][number].tolist() == [*sample.encoder, *sample.decoder]
        assert batch["padding"][number].tolist() == (sample.encoder == rule.pad).tolist()
        assert batch["labels"][number].tolist() == sample.labels.tolist()
        assert batch["loss_mask"][number].tolist() == (sample.labels >= 0).tolist()
    assert batch["samples"].tolist() == [7, 8, 9]


def test_made_up_samples_have_no_padding() -> None:
    rows = MockSpanRows(400, encoder_length=20, decoder_length=10, vocab_size=30, seed=3).batch(np.arange(400))
    assert rows.shape == (400, 40) and rows.min() == 1 and rows.max() == 29


def test_a_vocabulary_that_does_not_fit_the_data_is_said(
    runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "vocab.txt"
    short.write_text("".join(f"{token}\n" for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "w0", "##p0")))
    # The padding of the vocabulary holds all ids of the data.
    words = [*MODEL, "--vocab-file", str(short), "--data-path", str(runs.data), "--make-vocab-size-divisible-by", "64"]
    assert main(["pretrain", *words]) == 2
    assert "the file was prepared with another tokenizer" in capfd.readouterr().err


def test_made_up_data_measures_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*MODEL, "--vocab-size", "50", "--steps", "1", "--warmup", "1", "--json"]
    assert main(["bench", *words]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["task"] == "t5" and figures["tokens_per_second"] > 0
    assert figures["tokens_per_second"] == pytest.approx(8 * 36 / figures["step_seconds"])
    assert figures["model_tflops_causal"] < figures["model_tflops"]


def test_the_flags_of_megatrons_program_train_two_steps(runs: Runs) -> None:
    words = """
        --num-layers 2 --hidden-size 16 --num-attention-heads 2 --kv-channels 8 --ffn-hidden-size 32
        --encoder-seq-length 16 --decoder-seq-length 8 --micro-batch-size 2 --global-batch-size 4
        --max-position-embeddings 16 --train-iters 2 --lr-decay-iters 2 --vocab-extra-ids 8 --split 949,50,1
        --lr 0.0001 --min-lr 0.00001 --lr-decay-style linear --lr-warmup-fraction .01 --weight-decay 1e-2
        --clip-grad 1.0 --log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 0 --fp16
        --initial-loss-scale 128 --data-impl mmap
    """.split()
    files = ["--data-path", str(runs.data), "--vocab-file", str(runs.data.parent / "vocab.txt")]
    command = [sys.executable, "-m", "megalith.pretrain_t5", *words, *files]
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
    pattern = r"^ iteration +([12])/ +2 \|.* lm loss: (\d\.\d+E\+\d+) \| loss scale"
    steps = re.findall(pattern, done.stdout, re.MULTILINE)
    assert [number for number, _ in steps] == ["1", "2"], done.stdout
    assert all(4.0 < float(loss) < 5.5 for _, loss in steps)
    assert "building T5 model ..." in done.stdout and "> finished creating T5 datasets ..." in done.stdout
    assert " > loading indexed mapping from " in done.stdout


def made_up_documents(*, code: bool) -> Iterator[tuple[str, str]]:
    """Texts in which every word follows from the others."""
    colours = ("red", "green", "blue", "white", "black")
    for number in range(80):
        colour, other = colours[number % 5], colours[number % 7 % 5]
        sentence = f"The {colour} box number {number} stands behind the {other} door of the {colour} house. "
        yield f"box {number}", sentence * (3 + number % 4)


def test_a_table_of_distances_and_a_split_backward_pass_are_refused_together() -> None:
    words = "t5 --preset quickstart-t5 --position-embedding-type relative --pipeline-model-parallel-size 2"
    run = read_command_line([*words.split(), "--pipeline-schedule", "zero-bubble"])
    assert "--pipeline-schedule" in {fault.setting for fault in check(run, 2)}
    run = read_command_line([*words.split(), "--pipeline-schedule", "1f1b"])
    assert "--pipeline-schedule" not in {fault.setting for fault in check(run, 2)}


@pytest.mark.slow
def test_the_preset_learns_and_tells_what_frequencies_would_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megalith.corpora.titled_documents", made_up_documents)
    words = """
        --preset quickstart-t5 --num-layers 1 --hidden-size 64 --train-iters 80 --eval-iters 2 --eval-interval 100
        --corpus-vocab-size 300 --log-format json --device cpu
    """.split()
    assert main(["pretrain", *words, "--save", str(tmp_path / "run")]) == 0
    first, last = events_of(tmp_path / "run", "evaluated")
    said = re.search(r"unigram entropy: (\d+\.\d+), .* the model is (\d+\.\d+) below it", capfd.readouterr().out)
    assert said is not None
    assert float(said[1]) - float(said[2]) == pytest.approx(last["losses"]["lm loss"], abs=2e-3)
    assert last["losses"]["lm loss"] < float(said[1]) - 0.3 < first["losses"]["lm loss"]

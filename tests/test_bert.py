"""The task bert: its faults, its operations, its data, its baseline, and the program for Megatron-LM's scripts."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalith.check import check
from megalith.cli import main
from megalith.config import Run
from megalith.data.corpus import titled_documents
from megalith.data.indexed import open_indexed
from megalith.data.masking import SpanRule, pieces_of
from megalith.data.pairs import MockPairRows, PairBatches, PairRows, PairRule
from megalith.data.sentence_rows import SentenceRows
from megalith.data.tokenizer import load_tokenizer
from megalith.models.bert import Bert
from megalith.sources import read_command_line
from megalith.tasks.bert import TASK, build_mock, step_flops, unigram_baseline
from tests.layouts.runs import events_of, steps_of
from tests.layouts.test_bert import MODEL, write_data
from tests.operations import make_countable
from tests.sentences import write_sentences


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("bert"))


def words_of(data: Path) -> list[str]:
    return [*MODEL, "--data-path", str(data), "--vocab-file", str(data.parent / "vocab.txt")]


def run_of(data: Path, *words: str) -> Run:
    return read_command_line([*words_of(data), *words])


def test_a_run_without_faults_has_none(data: Path) -> None:
    assert check(run_of(data), 1) == []
    assert check(read_command_line([*MODEL, "--corpus", "python", "--save", "x"]), 1) == []
    assert check(read_command_line([*MODEL, "--mock-data", "--vocab-size", "50"]), 1) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--seq-length 4", "--seq-length = 4: is too short for a bert, whose samples need 5. Lengthen it."),
        ("--mask-prob 1", "--mask-prob = 1.0: must be above 0 and below 1 for bert. Give such a share."),
        (
            "--seq-length 9",
            "--mask-prob = 0.15: of the 6 tokens of text in --seq-length = 9 is less than one, so none is ever masked. "
            "Give at least 0.167, or longer sequences.",
        ),
        ("--short-seq-prob 1.5", "--short-seq-prob = 1.5: must be from 0 to 1. Give such a share."),
        (
            "--norm-after-residual --apply-residual-connection-post-layernorm",
            "--norm-after-residual: contradicts --apply-residual-connection-post-layernorm",
        ),
        (
            "--untie-embeddings-and-output-weights",
            "--untie-embeddings-and-output-weights: is for gpt; a bert scores tokens with its word table.",
        ),
        (
            "--tokenizer-type ByteLevelTokenizer",
            "--tokenizer-type = ByteLevelTokenizer: does not say which tokens begin",
        ),
        ("--context-parallel-size 2", "--context-parallel-size = 2: cuts the sequence of a gpt"),
        ("--vocab-file POOR", "--vocab-file = POOR: has no [SEP], no [MASK]. A bert needs them: add a line each."),
    ],
)
def test_faults_are_named_with_a_remedy(words: str, said: str, data: Path, tmp_path: Path) -> None:
    poor = tmp_path / "poor.txt"
    poor.write_text("[PAD]\n[UNK]\n[CLS]\nword\n")
    run = run_of(data, *words.replace("POOR", str(poor)).split())
    faults = [str(fault) for fault in check(run, 2)]
    assert any(fault.startswith(said.replace("POOR", str(poor))) for fault in faults), faults


def test_a_vocabulary_may_begin_with_a_byte_order_mark(data: Path, tmp_path: Path) -> None:
    marked = tmp_path / "vocab.txt"
    plain = run_of(data).data.vocab_file
    assert plain is not None and Path(plain).read_text().startswith("[PAD]")
    marked.write_text(Path(plain).read_text(), encoding="utf-8-sig")
    assert check(run_of(data, "--vocab-file", str(marked)), 1) == []
    tokenizers = [load_tokenizer("BertWordPieceLowerCase", vocab_file=str(file)) for file in (plain, marked)]
    assert tokenizers[0].pad == tokenizers[1].pad == 0
    assert tokenizers[0].vocab_size == tokenizers[1].vocab_size


def test_documents_that_are_not_split_are_refused_with_the_remedy(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from megalith.data.indexed import IndexedWriter

    with IndexedWriter(tmp_path / "whole_document", np.uint16) as writer:
        for _ in range(10):
            writer.add_document([np.arange(5, 50)])
    words = words_of(data)
    words[words.index("--data-path") + 1] = str(tmp_path / "whole_document")
    assert main(["pretrain", *words]) == 2
    said = capfd.readouterr().err
    assert f"megalith: {tmp_path / 'whole_document'}, train part: none of the 8 documents has 2 sentences" in said
    assert "prepare the text with --split-sentences" in said


@pytest.mark.parametrize("words", ["", "--bert-no-binary-head", "--norm-after-residual"])
def test_operations_are_those_that_pytorch_counts(words: str, data: Path) -> None:
    sizes = "--attention-dropout 0 --hidden-dropout 0 --ffn-hidden-size 40 --kv-channels 6".split()
    run = run_of(data, *sizes, *words.split())
    model = Bert(run.model, 64)
    make_countable(model)
    batch = build_mock(run, 64, {"train": 10})["train"].read(np.arange(5), np.arange(5))
    entries = {name: torch.from_numpy(array) for name, array in batch.items()}
    with FlopCounterMode(display=False) as counter:
        TASK.run_part(model, entries["tokens"], entries).sum().backward()
    # It leaves out products of a vector with one of weights.
    assert counter.get_total_flops() == pytest.approx(step_flops(run, 64, 5), rel=1e-3)


def pair_rows(data: Path, rows: list[list[int]], *, length: int = 24, pad: str = "[PAD]") -> PairRows:
    tokenizer = load_tokenizer("BertWordPieceLowerCase", vocab_file=str(data.parent / "vocab.txt"))
    rule = PairRule(
        length=length,
        pieces=pieces_of(tokenizer),
        cls=tokenizer.cls,
        sep=tokenizer.sep,
        mask=tokenizer.mask,
        pad=tokenizer.encode(pad)[0] if pad == "w3" else tokenizer.pad,
        masking=SpanRule(0.15),
        binary_head=True,
    )
    sentences = SentenceRows(open_indexed(data), np.array(rows, np.uint32), seed=1, vocab_size=64)
    return PairRows(sentences, rule)


@pytest.mark.parametrize("pad", ["[PAD]", "w3"])
def test_a_batch_says_where_tokens_are_real_masked_and_of_which_part(data: Path, pad: str) -> None:
    rows = pair_rows(data, [[0, 2, 21], [2, 4, 9]], pad=pad)
    batch = PairBatches(rows).read(np.array([0, 1]), np.array([7, 8]))
    for number, index in enumerate((0, 1)):
        sample = rows.sample(index)
        size = sample.num_tokens
        assert batch["tokens"][number].tolist() == sample.tokens.tolist()
        assert batch["padding"][number].tolist() == [1] * size + [0] * (24 - size)
        assert batch["types"][number, :size].tolist() == sample.types[:size].tolist()
        assert not batch["types"][number, size:].any()
        assert ((batch["labels"][number] >= 0) == (batch["loss_mask"][number] == 1)).all()
        assert batch["order"][number] == sample.swapped
    assert batch["order_mask"].tolist() == [1.0, 1.0] and batch["samples"].tolist() == [7, 8]


def test_the_baseline_is_the_entropy_of_the_sentences_of_all_samples_each_once(data: Path) -> None:
    rows = pair_rows(data, [[4, 7, 21], [2, 5, 21], [4, 7, 21], [9, 11, 21]])
    indexed = open_indexed(data)
    counts = Counter(int(token) for item in (2, 3, 4, 5, 6, 9, 10) for token in indexed.read(item))
    shares = np.array(list(counts.values())) / sum(counts.values())
    baseline = unigram_baseline(run_of(data), PairBatches(rows))
    assert baseline is not None and baseline.loss == "lm loss"
    assert baseline.value == pytest.approx(-(shares * np.log(shares)).sum())
    assert (
        unigram_baseline(run_of(data), PairBatches(MockPairRows(3, length=9, vocab_size=9, share=0.1, seed=1))) is None
    )


def test_made_up_samples_are_evenly_spread() -> None:
    rows = MockPairRows(400, length=50, vocab_size=30, share=0.15, seed=3)
    batch = PairBatches(rows).read(np.arange(400), np.arange(400))
    assert batch["loss_mask"].mean() == pytest.approx(0.15, abs=0.01)
    assert batch["order"].mean() == pytest.approx(0.5, abs=0.1)
    assert np.bincount(batch["tokens"].ravel(), minlength=30).min() > 500 and batch["tokens"].max() == 29
    assert batch["padding"].all() and batch["types"].mean() == 0.5
    assert (rows.batch(np.array([7])) == rows.batch(np.arange(8))[7]).all()


def test_a_blend_of_two_files_is_trained_on(data: Path, tmp_path: Path) -> None:
    other = write_sentences(tmp_path, name="other_sentence", seed=9)
    words = words_of(data)
    place = words.index("--data-path") + 1
    words[place : place + 1] = ["0.3", str(data), "0.7", str(other)]
    assert main(["pretrain", *words, "--train-iters", "3", "--save", str(tmp_path / "run")]) == 0
    assert len(steps_of(tmp_path / "run")) == 3
    assert len(events_of(tmp_path / "run", "blend_built")) == 2


def test_the_flags_of_megatrons_program_train_two_steps(data: Path) -> None:
    words = f"""
        --num-layers 2 --hidden-size 16 --num-attention-heads 2 --micro-batch-size 2 --global-batch-size 4
        --seq-length 24 --max-position-embeddings 24 --train-iters 2 --data-path {data} --data-impl mmap
        --vocab-file {data.parent / "vocab.txt"} --split 949,50,1 --lr 0.0001 --lr-decay-style linear --min-lr 1.0e-5
        --lr-decay-iters 2 --weight-decay 1e-2 --clip-grad 1.0 --lr-warmup-fraction .01 --log-interval 1
        --eval-interval 1000 --eval-iters 1 --fp16 --initial-loss-scale 128 --mask-prob 0.2 --short-seq-prob 0.2
        --mmap-warmup
    """.split()
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "megalith.pretrain_bert", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    pattern = r"^ iteration +([12])/ +2 \|.* lm loss: (\d\.\d+E\+\d+) \| sop loss: (\d\.\d+E[+-]\d+) \| loss scale"
    steps = re.findall(pattern, done.stdout, re.MULTILINE)
    assert [number for number, _, _ in steps] == ["1", "2"], done.stdout
    assert all(3.5 < float(lm) < 5.5 and 0.5 < float(sop) < 0.9 for _, lm, sop in steps)
    assert "building BERT model ..." in done.stdout and "> building BertWordPieceLowerCase tokenizer ..." in done.stdout
    indexed = open_indexed(data)
    index = indexed.document_index
    assert f"    number of sentences: {indexed.num_items}\n" in done.stdout
    assert (
        "    train:\n     document indices in [0, 57) total of 57 documents\n"
        f"     sentence indices in [0, {index[57]}) total of {index[57]} sentences\n"
    ) in done.stdout


def test_bench_measures_a_bert_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*MODEL, "--mock-data", "--vocab-size", "50", "--train-iters", "4", "--device", "cpu"]
    assert main(["bench", *words]) == 0
    assert "tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_the_preset_learns_and_tells_what_the_unigram_baseline_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megalith.corpora.titled_documents", some_documents)
    words = (
        "--preset quickstart-bert --train-iters 40 --eval-iters 2 --eval-interval 100 --log-format json --device cpu"
    )
    assert main(["pretrain", *words.split(), "--save", str(tmp_path / "run")]) == 0
    first, last = events_of(tmp_path / "run", "evaluated")
    said = capfd.readouterr().out
    found = re.search(r"unigram entropy: (\d\.\d+), the loss of knowing how often each token occurs", said)
    assert found is not None, said
    assert first["losses"]["lm loss"] > float(found[1]) + 1
    # It begins with how often tokens occur; the preset's own number of steps takes it far below.
    assert last["losses"]["lm loss"] < first["losses"]["lm loss"] - 1
    assert "finetune: megalith finetune" in said
    # A second start finds the corpus and the run where they are.
    assert main(["pretrain", *words.split(), "--save", str(tmp_path / "run")]) == 0
    assert "making a corpus" not in capfd.readouterr().out


def some_documents(*, code: bool) -> list[tuple[str, str]]:
    """A part of the text, so that a tokenizer is trained in a second."""
    return list(titled_documents(code=code))[::12]

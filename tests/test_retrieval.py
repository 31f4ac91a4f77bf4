"""megalith index and megalith evaluate for a bi-encoder: from a run directory to answered questions."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import megalith.indexing as indexing
from megalith.asked import asked_of_index
from megalith.cli import main
from megalith.data.evidence import read_passages
from megalith.evaluate.embeddings import open_embeddings
from megalith.files import DISK, Disk
from megalith.parallel.mesh import Layout, make_layout
from megalith.trained import run_of
from megalith.trained_retrieval import embed, open_retriever
from tests.layouts.runs import Runs
from tests.layouts.test_ict import MODEL, TITLES, VOCABULARY, micro, write_texts
from tests.ranks import run_ranks

NUM_PASSAGES = 83
BATCH = 4
SPANS = 2  # with SPAN_BATCHES patched


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a tiny bi-encoder."""
    folder = tmp_path_factory.mktemp("retrieval")
    files = ["--titles-data-path", str(folder / TITLES), "--vocab-file", str(folder / "vocab.txt")]
    words = [*MODEL, *files, *micro(4), "--retriever-seq-length", "12"]
    return Runs(folder, model=words, write=write_texts)(1)


@pytest.fixture(scope="module")
def evidence(run: Path) -> Path:
    """Passages of random words."""
    random = np.random.RandomState(2)
    path = run.parent / "evidence.tsv"
    lines = ["id\ttext\ttitle"]
    for number in range(NUM_PASSAGES):
        text = " ".join(VOCABULARY[word] for word in random.randint(5, 63, random.randint(1, 20)))
        lines.append(f"{1000 - number}\t{text}\tword{number % 58}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "SPAN_BATCHES", SPANS)


def index_words(run: Path, evidence: Path, path: Path, *more: str) -> list[str]:
    words = ["--evidence-data-path", str(evidence), "--embedding-path", str(path), "--indexer-batch-size", str(BATCH)]
    return [str(run), *words, "--device", "cpu", *more]


def make(words: Sequence[str], *, ranks: int = 1, disk: Disk = DISK) -> None:
    """What the command does on one rank, or on several."""
    options = asked_of_index(words)
    if ranks == 1:
        layout = make_layout({}, tensor=1, pipeline=1)
        indexing.make_index(indexing.plan(options, layout), layout, disk=disk)
        return

    def on_rank(rank: int) -> None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        layout = make_layout({"RANK": str(rank), "WORLD_SIZE": str(ranks)}, tensor=1, pipeline=1)
        indexing.make_index(indexing.plan(options, layout), layout, disk=disk)

    run_ranks(on_rank, ranks)


@pytest.fixture(scope="module")
def undisturbed(run: Path, evidence: Path) -> Path:
    """The embeddings of an index that one rank made in one go."""
    path = run.parent / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "SPAN_BATCHES", SPANS)
        make(index_words(run, evidence, path))
    return path


def test_a_step_without_a_checkpoint_is_one_sentence_and_status_2(
    run: Path, evidence: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = index_words(run, evidence, run.parent / "of_no_step", "--step", "77")
    assert main(["index", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megalith: {run / 'checkpoints'} has no checkpoint of step 77; it has [")


def test_every_passage_has_the_vector_of_its_title_and_text(run: Path, evidence: Path, undisturbed: Path) -> None:
    opened = open_embeddings(undisturbed)
    retriever = open_retriever(str(run), step=None, device="cpu")
    passages = list(read_passages(evidence))
    assert opened.ids.tolist() == [passage.id for passage in passages] and len(passages) == NUM_PASSAGES
    marks, tokenizer = retriever.marks, retriever.tokenizer
    assert marks.length == 12
    for passage, vector in zip(passages, opened.vectors, strict=True):
        # Written out: cut to the length, [SEP] at the end.
        ids = [*[2, *tokenizer.encode(passage.title), 3, *tokenizer.encode(passage.text)][:11], 3]
        alone = retriever.model.context(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))
        np.testing.assert_allclose(vector, alone[0].detach().numpy(), rtol=2e-3, atol=2e-3)
    assert opened.vectors.dtype == np.float16 and opened.vectors.shape[1] == 8
    assert not undisturbed.with_name("undisturbed.parts").exists()


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_makes_the_same_file(
    ranks: int, run: Path, evidence: Path, undisturbed: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and ranks > 2:
        pytest.skip("run with --slow")
    make(index_words(run, evidence, tmp_path / "embeddings"), ranks=ranks)
    assert (tmp_path / "embeddings").read_bytes() == undisturbed.read_bytes()


class _KilledError(BaseException):
    """As little can be caught of it as of a kill."""


class KillingDisk(Disk):
    """Dies at one of its operations that change the disk, and leaves what is there."""

    def __init__(self, dies_at: int) -> None:
        self.left = dies_at

    def _operate(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise _KilledError

    def create(self, path: Path) -> int:
        self._operate()
        return super().create(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        self._operate()
        return super().write(descriptor, data)

    def rename(self, source: Path, target: Path) -> None:
        self._operate()
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self._operate()
        super().remove(path)

    def remove_directory(self, path: Path) -> None:
        self._operate()
        super().remove_directory(path)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that are embedded from now on."""
    sizes: list[int] = []

    def embed_and_count(tower: Any, marks: Any, sequences: Any) -> Any:
        sizes.append(len(sequences))
        return embed(tower, marks, sequences)

    monkeypatch.setattr(indexing, "embed", embed_and_count)
    return sizes


def test_an_index_that_was_killed_goes_on_with_what_it_had(
    run: Path, evidence: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = index_words(run, evidence, tmp_path / "embeddings")
    sizes = counted(monkeypatch)
    deaths = 0
    # Every start gets a little further; each is killed at another operation, to the last.
    for dies_at in [*range(1, 40), 200]:
        try:
            make(words, disk=KillingDisk(dies_at))
            break
        except _KilledError:
            deaths += 1
            if (tmp_path / "embeddings").exists():
                assert (tmp_path / "embeddings").read_bytes() == undisturbed.read_bytes()
    assert deaths > 5
    assert (tmp_path / "embeddings").read_bytes() == undisturbed.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings"]
    # A killed start loses the span that it was at, and nothing else.
    assert sum(sizes) <= NUM_PASSAGES + deaths * BATCH * SPANS


def test_ranks_whose_spans_are_there_wait_a_day_for_those_that_embed(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_rank(rank: int) -> timedelta:
        dist.destroy_process_group()
        del os.environ["GLOO_SOCKET_IFNAME"]
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        found: list[timedelta] = []

        def noting(work: SimpleNamespace, layout: Layout) -> None:
            world: Any = dist.group.WORLD
            found.append(world._get_backend(torch.device("cpu")).options._timeout)
            dist.barrier()

        work = SimpleNamespace(path="embeddings", log_interval=1, made_from={})
        monkeypatch.setattr(indexing, "plan", lambda options, layout: work)
        monkeypatch.setattr(indexing, "make_index", noting)
        words = ["run", "--device", "cpu"]
        assert indexing.main(asked_of_index(words), words) == 0
        return found[0]

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert run_ranks(on_rank, 2) == [timedelta(days=1)] * 2


def test_what_lies_there_damaged_or_of_other_weights_is_made_again(
    run: Path, evidence: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = index_words(run, evidence, tmp_path / "embeddings")
    monkeypatch.setattr(indexing, "join_spans", lambda *args, **kwargs: None)
    make(words)
    folder = tmp_path / "embeddings.parts"
    spans = sorted(folder.iterdir())
    content = bytearray(spans[1].read_bytes())
    content[-1] ^= 1
    spans[1].write_bytes(content)
    spans[2].write_bytes(spans[3].read_bytes())
    monkeypatch.undo()
    monkeypatch.setattr(indexing, "SPAN_BATCHES", SPANS)
    sizes = counted(monkeypatch)
    make(words)
    assert sum(sizes) == 2 * BATCH * SPANS
    assert (tmp_path / "embeddings").read_bytes() == undisturbed.read_bytes()


def test_a_second_start_finds_the_file_and_other_embeddings_are_not_replaced(
    run: Path, evidence: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = undisturbed.read_bytes()
    assert main(["index", *index_words(run, evidence, undisturbed)]) == 0
    assert "is there already, made of the same weights and passages" in capsys.readouterr().out
    assert main(["index", *index_words(run, evidence, undisturbed, "--step", "10")]) == 2
    assert "holds other embeddings. Remove it, or name another file." in capsys.readouterr().err
    assert undisturbed.read_bytes() == before


def test_progress_is_told_in_megatrons_words(
    run: Path, evidence: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = index_words(run, evidence, tmp_path / "embeddings", "--indexer-log-interval", "10")
    assert main(["index", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Batch         10 | Total         40", "Batch         20 | Total         80"]
    assert lines[2:] == [f"83 passages are embedded in {tmp_path / 'embeddings'}"]


def test_faults_of_an_index_are_told_at_once(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--indexer-batch-size", "0", "--sample-rate", "2", "--embedding-path", str(tmp_path / "no" / "file")]
    assert main(["index", str(run), *words, "--evidence-data-path", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "--indexer-batch-size = 0: must be greater than 0." in said
    assert "--sample-rate = 2.0: must be above 0 and at most 1." in said
    assert re.search(r"--evidence-data-path = .*none: is not a file\.", said)
    assert "there is no directory" in said
    assert main(["index", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.count("is required and was not given") == 2
    empty = tmp_path / "empty.tsv"
    empty.write_text("id\ttext\ttitle\n")
    assert main(["index", *index_words(run, empty, tmp_path / "e")]) == 2
    assert "holds no passage" in capsys.readouterr().err
    words = index_words(run, empty, tmp_path / "e", "--retriever-seq-length", "99")
    assert main(["index", *words]) == 2
    assert "--retriever-seq-length = 99: the model has 16 positions." in capsys.readouterr().err


def test_faults_of_the_evidence_are_told_before_anything_is_embedded(
    run: Path, evidence: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(indexing, "embed")
    rows = evidence.read_text().splitlines()
    for line in (30, 70):  # counted from 1
        rows[line - 1] = "\t".join([rows[9].split("\t")[0], *rows[line - 1].split("\t")[1:]])
    bad = tmp_path / "bad.tsv"
    bad.write_text("\n".join(rows))
    words = index_words(run, bad, tmp_path / "embeddings")
    assert main(["index", *words]) == 2
    said = f"{bad}: 2 passages have the id of an earlier one: the first is 992, in lines 10, 30, 70. Give each"
    assert said in capsys.readouterr().err
    bad.write_text("\n".join([*rows[:20], "77\tonly a text"]))
    assert main(["index", *words]) == 2
    assert f"{bad}, line 21: has 2 columns; evidence has id, text and title" in capsys.readouterr().err
    assert not (tmp_path / "embeddings.parts").exists()


def test_all_passages_are_embedded_unless_a_share_is_asked_for(
    run: Path, evidence: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = shutil.copytree(run, tmp_path / "run")
    text = (sampled / "run.toml").read_text()
    (sampled / "run.toml").write_text(text.replace("[data]\n", "[data]\nsample_rate = 0.1\n"))
    assert run_of(str(sampled)).data.sample_rate == 0.1
    assert main(["index", *index_words(sampled, evidence, tmp_path / "all")]) == 0
    assert capsys.readouterr().out == f"{NUM_PASSAGES} passages are embedded in {tmp_path / 'all'}\n"
    assert main(["index", *index_words(sampled, evidence, tmp_path / "some", "--sample-rate", "0.5")]) == 0
    found = len(open_embeddings(tmp_path / "some"))
    assert 25 < found < 60
    told = f"{found} passages, chosen by --sample-rate 0.5, are embedded in {tmp_path / 'some'}\n"
    assert capsys.readouterr().out == told


def test_a_length_that_nobody_gave_is_what_the_model_holds(run: Path, evidence: Path, tmp_path: Path) -> None:
    untold = shutil.copytree(run, tmp_path / "run")
    text = (untold / "run.toml").read_text()
    (untold / "run.toml").write_text(text.replace("retriever_seq_length = 12\n", ""))
    assert run_of(str(untold)).data.retriever_seq_length == 256
    make(index_words(untold, evidence, tmp_path / "embeddings"))
    assert open_embeddings(tmp_path / "embeddings").made_from["length"] == 16


@pytest.fixture(scope="module")
def questions(run: Path) -> Path:
    """Questions whose answers are words of the evidence, and one whose answer is nowhere."""
    path = run.parent / "questions.tsv"
    lines = [f"word{n} word{n + 1}\t['word{n} word{n + 2}', 'word{n + 7}']" for n in range(20)]
    path.write_text("\n".join([*lines, "word1\t['nowhere']"]) + "\n", encoding="utf-8")
    return path


def answered(run: Path, evidence: Path, questions: Path, embeddings: Path, *more: str) -> int:
    files = ["--evidence-data-path", str(evidence), "--embedding-path", str(embeddings)]
    return main(["evaluate", str(run), "--qa-data-dev", str(questions), *files, "--device", "cpu", *more])


def hits_by_definition(run: Path, evidence: Path, questions: Path, embeddings: Path, count: int) -> list[int]:
    """How many questions have an answer among the first k passages, written out."""
    retriever, opened = open_retriever(str(run), step=None, device="cpu"), open_embeddings(embeddings)
    texts = {passage.id: passage.text.split() for passage in read_passages(evidence)}
    hits = np.zeros(count, int)
    for line in questions.read_text().splitlines():
        question, answers = line.split("\t")
        ids = [2, *retriever.tokenizer.encode(question), 3]
        vector = retriever.model.query(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))[0].detach()
        order = opened.ids[np.argsort(-(opened.vectors.astype(np.float64) @ vector.double().numpy()))][:count]
        wanted = [answer.strip("' []").split() for answer in answers.split(",")]
        for rank, number in enumerate(order):
            words = texts[int(number)]
            if any(words[place : place + len(answer)] == answer for answer in wanted for place in range(len(words))):
                hits[rank:] += 1
                break
    return hits.tolist()


@pytest.mark.parametrize("search", ["torch", "faiss"])
def test_questions_are_answered_and_told_in_megatrons_words(
    search: str, run: Path, evidence: Path, questions: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if search == "faiss":
        pytest.importorskip("faiss")
    words = ["--faiss-topk-retrievals", "9", "--retriever-report-topk-accuracies", "1", "5", "--search", search]
    assert answered(run, evidence, questions, undisturbed, *words) == 0
    hits = hits_by_definition(run, evidence, questions, undisturbed, 9)
    assert 0 < hits[0] < hits[8] < 21
    assert capsys.readouterr().out.splitlines() == [
        "DEV SET RESULTS",
        f"topk-9 documents hits {hits}",
        f"top-k documents hits accuracy {[count / 21 for count in hits]}",
        f"top-1: {hits[0] / 21 * 100:.2f}",
        f"top-5: {hits[4] / 21 * 100:.2f}",
    ]
    # Patterns that are these very words find the same and more: parts of words too.
    assert answered(run, evidence, questions, undisturbed, *words, "--faiss-match", "regex", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert all(more >= fewer for more, fewer in zip(report["dev"]["hits"], hits, strict=True))
    assert report["passages"] == 83 and report["dev"]["questions"] == 21


def test_accuracies_among_more_passages_than_are_found_are_left_out_and_told(
    run: Path, evidence: Path, questions: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_of(str(run)).evaluate.retriever_report_topk_accuracies == (1, 3)

    def told(*words: str) -> tuple[list[str], str]:
        assert answered(run, evidence, questions, undisturbed, *words) == 0
        said = capsys.readouterr()
        return [line.split(":")[0] for line in said.out.splitlines() if re.match(r"top-\d", line)], said.err

    flag = "--retriever-report-topk-accuracies"
    few = ["--faiss-topk-retrievals", "2"]
    assert told(*few) == (["top-1"], f"note: {flag} of the run: 3 left out, --faiss-topk-retrievals = 2.\n")
    many = ["--faiss-topk-retrievals", "500", flag, "5", "84", "500"]
    assert told(*many) == (["top-5"], f"note: {flag}: 84 500 left out, there are 83 passages.\n")
    assert told() == (["top-1", "top-3"], "")


def test_faults_of_an_evaluation_are_told_before_anything_is_searched(
    run: Path, evidence: Path, questions: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str, **changed: Path) -> str:
        files = {"evidence": evidence, "questions": questions, "embeddings": undisturbed, **changed}
        assert answered(run, files["evidence"], files["questions"], files["embeddings"], *words) == 2
        return capsys.readouterr().err

    assert "--retriever-report-topk-accuracies = 200: is not from 1 to --faiss-topk-retrievals" in said(
        "--retriever-report-topk-accuracies", "200"
    )
    assert "a bi-encoder answers questions" in said("--split", "valid")
    assert "is not a file" in said(questions=tmp_path / "none")
    other = tmp_path / "other.tsv"
    other.write_text(evidence.read_text() + "5\tword1\tword1\n")
    assert "was made of other passages" in said(evidence=other)
    assert "was made by other weights (step 20) than those of step 10. Give --step" in said("--step", "10")
    broken = tmp_path / "broken.tsv"
    broken.write_text("word1\t['(']\n")
    assert "DEV question 'word1': '(' is no regular expression" in said("--faiss-match", "regex", questions=broken)
    damaged = tmp_path / "damaged"
    content = bytearray(undisturbed.read_bytes())
    content[-5] ^= 4
    damaged.write_bytes(content)
    assert re.search(r"damaged: rows \d+ to 82: expected what was written, found other bytes", said(embeddings=damaged))
    assert main(["evaluate", str(run)]) == 2
    assert "neither it nor --qa-data-test was given" in capsys.readouterr().err


@pytest.mark.slow
def test_the_commands_ranks_index_together(run: Path, evidence: Path, tmp_path: Path) -> None:
    words = index_words(run, evidence, tmp_path / "embeddings", "--nproc", "2")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "megalith", "index", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(open_embeddings(tmp_path / "embeddings")) == NUM_PASSAGES

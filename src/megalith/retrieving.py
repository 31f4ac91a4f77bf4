"""megalith evaluate, for a bi-encoder: how often the passages found for a question hold an answer to it."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megalith.config import Run
from megalith.data.evidence import read_passages
from megalith.data.questions import Question, read_questions
from megalith.evaluate.answers import Match, PatternMatch, WordMatch, hits_at
from megalith.evaluate.embeddings import Embeddings, open_embeddings
from megalith.evaluate.search import SEARCHES, has_faiss
from megalith.files import digest_of
from megalith.trained import run_of
from megalith.trained_retrieval import TrainedRetriever, digest_of_weights, embed, open_retriever

QUESTIONS_AT_ONCE = 64
SPLITS = {"qa_data_dev": "DEV", "qa_data_test": "TEST"}
USUAL_COUNTS = (1, 5, 20, 100)  # reported where neither the words nor the run name any


@dataclass(frozen=True)
class Found:
    """What was found of a split: for each k from 1, how many questions have an answer among their k best passages."""

    split: str
    questions: int
    hits: list[int]
    given_up: int  # searches for a pattern that took too long

    @property
    def accuracies(self) -> list[float]:
        """Shares of the questions."""
        return [hits / self.questions for hits in self.hits]

    def lines(self, reported: Sequence[int]) -> Iterator[str]:
        """In Megatron-LM's words."""
        yield f"{self.split} SET RESULTS"
        yield f"topk-{len(self.hits)} documents hits {self.hits}"
        yield f"top-k documents hits accuracy {self.accuracies}"
        for k in reported:
            yield f"top-{k}: {self.accuracies[k - 1] * 100:.2f}"

    def report(self, reported: Sequence[int]) -> dict[str, Any]:
        """The same as an object."""
        tops = {f"top{k}_acc": self.accuracies[k - 1] * 100 for k in reported}
        return {"questions": self.questions, **tops, "hits": self.hits, "searches_given_up": self.given_up}


def answer(options: argparse.Namespace) -> dict[str, Any]:
    """Print how the run answers the questions asked for, unless --json; give it as one object.

    Raises ValueError for what is missing or unfit, all files before the first search.
    """
    run = run_of(options.run)
    evidence: str | None = options.evidence_data_path or run.data.evidence_data_path
    path: str | None = options.embedding_path or run.evaluate.embedding_path
    asked = {name: getattr(options, name) for name in SPLITS if getattr(options, name) is not None}
    if faults := list(_faults(options, evidence, path, asked)):
        raise ValueError("\n".join(faults))
    assert evidence is not None and path is not None, "faults were told"
    questions = {SPLITS[name]: read_questions(file) for name, file in asked.items()}
    matches = {split: [_match(options.faiss_match, q, split) for q in of] for split, of in questions.items()}
    if options.faiss_use_gpu:
        print("note: --faiss-use-gpu is accepted; --search torch --device cuda searches on the GPU.", file=sys.stderr)
    embeddings = open_embeddings(path)
    length = embeddings.made_from.get("length")
    retriever = open_retriever(
        options.run, step=options.step, device=options.device, length=length if isinstance(length, int) else None
    )
    _check_origin(retriever, embeddings, evidence)
    count = min(options.faiss_topk_retrievals, len(embeddings))
    reported = _reported(options, run, count, len(embeddings))
    ids = {
        split: SEARCHES[options.search](embeddings, embed_questions(retriever, of), count)[0]
        for split, of in questions.items()
    }
    passages = _read_found(evidence, retriever, ids.values())
    report: dict[str, Any] = {"run": options.run, "step": retriever.step, "passages": len(embeddings)}
    for split in questions:
        found = _judge(split, matches[split], ids[split], passages)
        report[split.lower()] = found.report(reported)
        if not options.json:
            print("\n".join(found.lines(reported)))
        if found.given_up:
            print(f"warning: {found.given_up} searches for a pattern took too long: no hits.", file=sys.stderr)
    return report


def _faults(
    options: argparse.Namespace,
    evidence: str | None,
    path: str | None,
    asked: dict[str, str],
) -> Iterator[str]:
    if options.split is not None or options.file:
        yield "--split and --file: a bi-encoder answers questions. Use --qa-data-dev or --qa-data-test."
    if not asked:
        yield "--qa-data-dev: neither it nor --qa-data-test was given. Add questions."
    named = {"evidence-data-path": evidence, "embedding-path": path}
    for name, file in {**named, **{name.replace("_", "-"): file for name, file in asked.items()}}.items():
        if file is None:
            yield f"--{name}: is required and was not given. Add it."
        elif not Path(file).is_file():
            yield f"--{name} = {file}: is not a file. Correct the path."
    count = options.faiss_topk_retrievals
    if count < 1:
        yield f"--faiss-topk-retrievals = {count}: must be greater than 0. Give a positive number."
    wrong = [k for k in options.retriever_report_topk_accuracies or () if not 1 <= k <= max(count, 1)]
    if wrong:
        yield (
            f"--retriever-report-topk-accuracies = {' '.join(map(str, wrong))}: is not from 1 to "
            f"--faiss-topk-retrievals = {count}. Change one of them."
        )
    if options.search == "faiss" and not has_faiss():
        yield "--search = faiss: FAISS is not installed. Run pip install 'megalith[faiss]', or use --search torch."


def _reported(options: argparse.Namespace, run: Run, count: int, num_passages: int) -> list[int]:
    """Of how many passages accuracies are told, at most count; of what was asked for, says what is left out."""
    typed, of_run = options.retriever_report_topk_accuracies, run.evaluate.retriever_report_topk_accuracies
    wanted = typed or of_run or ()
    if left_out := [k for k in wanted if k > count]:
        whose = "--retriever-report-topk-accuracies" + ("" if typed else " of the run")
        why = f"--faiss-topk-retrievals = {count}" if count < num_passages else f"there are {num_passages} passages"
        print(f"note: {whose}: {' '.join(map(str, left_out))} left out, {why}.", file=sys.stderr)
    return [k for k in wanted or USUAL_COUNTS if k <= count]


def _match(kind: str, question: Question, split: str) -> Match:
    if kind == "string":
        return WordMatch(question.answers)
    try:
        return PatternMatch(question.answers)
    except ValueError as error:
        raise ValueError(f"{split} question {question.text[:60]!r}: {error}") from error


def _check_origin(retriever: TrainedRetriever, embeddings: Embeddings, evidence: str) -> None:
    """Raise ValueError unless the embeddings are of these weights and passages."""
    made_from = embeddings.made_from
    if made_from.get("weights") != digest_of_weights(retriever.model.context):
        step = str(made_from.get("step"))[:20]
        raise ValueError(
            f"--embedding-path = {embeddings.path}: was made by other weights (step {step}) than those of step "
            f"{retriever.step}. Give --step, or run megalith index again."
        )
    if made_from.get("evidence") != digest_of(evidence).digest:
        raise ValueError(f"--embedding-path = {embeddings.path}: was made of other passages than {evidence} holds now")


def embed_questions(retriever: TrainedRetriever, questions: Sequence[Question]) -> torch.Tensor:
    """fp32 QD: the questions' vectors, on the model's device."""
    model, marks = retriever.model, retriever.marks
    ids = retriever.tokenizer.encode_batch([question.text for question in questions])
    sequences = [marks.mark(tokens) for tokens in ids]
    parts = [
        embed(model.query, marks, sequences[first : first + QUESTIONS_AT_ONCE])
        for first in range(0, len(sequences), QUESTIONS_AT_ONCE)
    ]
    return torch.from_numpy(np.concatenate(parts)).to(next(model.parameters()).device)


def _read_found(evidence: str, retriever: TrainedRetriever, ids: Any) -> dict[int, str]:
    """The texts of the passages with these ids."""
    wanted = {int(number) for found in ids for number in np.unique(found)}
    return {passage.id: passage.text for passage in read_passages(evidence) if passage.id in wanted}


def _judge(split: str, matches: Sequence[Match], ids_QK: NDArray[np.int64], passages: dict[int, str]) -> Found:
    ranks: list[int | None] = []
    for match, ids_K in zip(matches, ids_QK, strict=True):
        ranks.append(next((rank for rank, number in enumerate(ids_K) if match(passages[int(number)])), None))
    given_up = sum(match.given_up for match in matches if isinstance(match, PatternMatch))
    return Found(split, len(matches), hits_at(ranks, ids_QK.shape[1]), given_up)

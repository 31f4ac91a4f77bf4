"""Questions with the passage that answers each and some that do not, as batches (DPR, Karpukhin et al. 2020).

arXiv:2004.04906. What is chosen for a sample follows from the seed and its place in the data, so it is the same whoever
reads it when.

Shape letters: B batch, N passages of a question (the right one first), T sequence length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.marked import Marks
from megalith.data.masking import random_of
from megalith.data.questions import Evidence, TrainingQuestion
from megalith.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Negatives:
    """How many passages that do not answer a question go with it.

    hard: at most so many hard ones; others: at most so many others, and as many more as hard ones are missing if
    filled. shuffled: they are chosen at random, not taken from the front.
    """

    hard: int
    others: int
    filled: bool
    shuffled: bool

    @property
    def count(self) -> int:
        return self.hard + self.others

    def held(self, question: TrainingQuestion) -> int:
        """How many there are of one question."""
        hard, others = min(self.hard, len(question.hard)), self.others
        return hard + min(others + (self.hard - hard if self.filled else 0), len(question.others))

    def choose(self, question: TrainingQuestion, random: np.random.RandomState) -> list[Evidence]:
        """Those of one question, hard ones first."""
        hard, others = list(question.hard), list(question.others)
        if self.shuffled:
            hard, others = ([group[place] for place in random.permutation(len(group))] for group in (hard, others))
        chosen = hard[: self.hard]
        missing = self.hard - len(chosen) if self.filled else 0
        return [*chosen, *others[: self.others + missing]]


class QuestionBatches:
    """Questions and their passages; a passage that is missing has no real token.

    lock: held while texts are encoded, by all who share the tokenizer.
    """

    def __init__(
        self,
        questions: Sequence[TrainingQuestion],
        tokenizer: Tokenizer,
        marks: Marks,
        *,
        negatives: Negatives,
        seed: int,
        vocab_size: int,
        lock: Lock,
    ) -> None:
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}; use its own")
        self.questions = questions
        self.negatives = negatives
        self.marks = marks
        self._tokenizer = tokenizer
        self._seed = seed
        self._lock = lock

    def __len__(self) -> int:
        return len(self.questions)

    def read(self, indices: NDArray[np.int64], samples: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """queries BT and contexts BNT, for each which tokens are real; loss_mask B.

        Where an index is -1, no passage is there and the mask is 0.
        """
        asked = [self.questions[int(index)] for index in indices]
        # By the sample's number: in another epoch others are chosen.
        chosen = [
            [question.positive, *self.negatives.choose(question, random_of(self._seed, int(sample)))]
            for question, sample in zip(asked, samples, strict=True)
        ]
        queries, real_queries = self.marks.fill([self.marks.mark(ids) for ids in self._encode([q.text for q in asked])])
        flat = [passage for passages in chosen for passage in passages]
        ids = self._encode([text for passage in flat for text in (passage.title, passage.text)])
        tokens, real = self.marks.fill([self.marks.mark(*ids[place : place + 2]) for place in range(0, len(ids), 2)])
        contexts = np.full((len(asked), 1 + self.negatives.count, self.marks.length), self.marks.pad, np.int64)
        real_contexts = np.zeros_like(contexts)
        first = 0
        for row, passages in enumerate(chosen):
            contexts[row, : len(passages)] = tokens[first : first + len(passages)]
            real_contexts[row, : len(passages)] = real[first : first + len(passages)]
            first += len(passages)
        real_contexts[indices < 0] = 0
        return {
            "queries": queries,
            "queries_real": real_queries,
            "contexts": contexts,
            "contexts_real": real_contexts,
            "loss_mask": (indices >= 0).astype(np.float32),
            "samples": np.asarray(samples, np.int64),
        }

    def _encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        with self._lock:
            return self._tokenizer.encode_batch(texts)

"""Which sentences make which sample, in Megatron-LM's order, bit for bit: for BERT and T5.

A sample is some sentences of one document, as many as reach its target length. Most samples have the same target, some
a shorter one drawn at random. Which draw belongs to which sample depends on how many samples all documents before gave,
so there is a loop over samples; but with the common target a sample's end is a function of its first sentence, found
for all sentences at once. What remains in the loop is a look into a table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.survey import nothing
from megalith.data.twister import Twister64

LONGEST_SENTENCE = 512  # tokens; a document with a longer sentence beside others gives no sample
WIDE_SENTENCES = 2**32 - 1  # with more sentences a map takes 64 bits
BLOCK = 1 << 18  # sentences or rows worked on at once, which bounds the lists that the loops need
SHORTEST_TARGET = 2


@dataclass(frozen=True)
class SentencePlan:
    """How sentences become samples.

    longest: tokens of a sample without special tokens. least: sentences that a sample needs.
    """

    longest: int
    least: int
    short_share: float  # of samples with a shorter target, as near to it as one in a whole number comes
    seed: int

    def __post_init__(self) -> None:
        if self.longest < SHORTEST_TARGET or self.least < 1 or not 0 <= self.short_share <= 1:
            raise ValueError(
                f"sentence samples of {self.longest} tokens, at least {self.least} sentences, a share of "
                f"{self.short_share} shortened: expected 2 or more, 1 or more, 0 to 1; give a longer --seq-length"
            )


def build_sentence_map(
    document_index: NDArray[np.int64],
    lengths: NDArray[np.int32],
    *,
    num_samples: int,
    plan: SentencePlan,
    moved: Callable[[], None] = nothing,
) -> NDArray[Any]:
    """[N, 3]: first sentence, the one after the last, and target length of each sample, shuffled; N >= num_samples.

    document_index: the sentence at which each document of the part starts, then the end of the last; lengths: tokens of
    every sentence of the token file. All documents are gone through as often as it takes, always to the end of a pass.
    moved: called after each block of the work. Raises ValueError if no document has a sample.
    """
    rows = list_samples(document_index, lengths, num_samples=num_samples, plan=plan, moved=moved)
    shuffle_rows(rows, plan.seed, moved=moved)
    return rows


def list_samples(
    document_index: NDArray[np.int64],
    lengths: NDArray[np.int32],
    *,
    num_samples: int,
    plan: SentencePlan,
    moved: Callable[[], None] = nothing,
) -> NDArray[Any]:
    """The same in the order of the documents."""
    dtype = np.uint64 if len(lengths) > WIDE_SENTENCES else np.uint32
    bounds = usable_documents(document_index, lengths, plan.least)
    if not len(bounds):
        raise ValueError(
            f"none of the {len(document_index) - 1} documents has {plan.least} sentences and none of more than "
            f"{LONGEST_SENTENCE} tokens: no sample can be made; prepare the text with --split-sentences"
        )
    targets = _Targets(plan)
    passes: list[NDArray[Any]] = []
    found = 0
    while found < num_samples or not passes:
        for begin in range(0, len(bounds), BLOCK):
            passes.append(_samples_of(bounds[begin : begin + BLOCK], lengths, plan, targets, dtype))
            found += len(passes[-1])
            moved()
    return np.concatenate(passes)


def usable_documents(document_index: NDArray[np.int64], lengths: NDArray[np.int32], least: int) -> NDArray[np.int64]:
    """[U, 2]: first sentence and the one after the last of the documents that samples are made of.

    They have at least least sentences and, if they have two or more, none longer than LONGEST_SENTENCE.
    """
    short, spoilt = _unusable(document_index, lengths, least)
    kept = ~(short | spoilt)
    return np.stack([document_index[:-1][kept], document_index[1:][kept]], axis=1).astype(np.int64)


@dataclass(frozen=True)
class DocumentUse:
    """Of how many documents samples are made, and of how many not: too few sentences, or one that is too long."""

    used: int
    short: int
    spoilt: int

    @property
    def total(self) -> int:
        return self.used + self.short + self.spoilt


def document_use(document_index: NDArray[np.int64], lengths: NDArray[np.int32], least: int) -> DocumentUse:
    """What becomes of the documents by the rules of `usable_documents`."""
    short, spoilt = _unusable(document_index, lengths, least)
    return DocumentUse(int((~(short | spoilt)).sum()), int(short.sum()), int((spoilt & ~short).sum()))


def _unusable(
    document_index: NDArray[np.int64], lengths: NDArray[np.int32], least: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For each document whether it has too few sentences, and whether one of several is too long."""
    firsts, lasts = document_index[:-1], document_index[1:]
    counts = lasts - firsts
    spoilt = np.zeros(len(firsts), bool)
    if len(firsts):
        too_long = np.flatnonzero(lengths[firsts[0] : lasts[-1]] > LONGEST_SENTENCE) + firsts[0]
        # The document of a sentence is the last one that starts at or before it: empty ones before it start there too.
        spoilt[np.searchsorted(firsts, too_long, side="right") - 1] = True
    return counts < max(least, 1), spoilt & (counts > 1)


class _Targets:
    """The target length of each sample, one draw each, in order; every document draws one more than it uses."""

    def __init__(self, plan: SentencePlan) -> None:
        self._random = np.random.RandomState(plan.seed)
        self._ratio = int(np.floor(1.0 / plan.short_share + 0.5)) if plan.short_share > 0 else 0
        self._longest = plan.longest
        self._ready = np.empty(0, np.int64)

    def ahead(self, count: int) -> NDArray[np.int64]:
        """The next count targets, without taking them."""
        if (missing := count - len(self._ready)) > 0:
            self._ready = np.append(self._ready, self._drawn(missing))
        return self._ready[:count]

    def take(self, count: int) -> None:
        self._ready = self._ready[count:].copy()

    def _drawn(self, count: int) -> NDArray[np.int64]:
        if not self._ratio:
            return np.full(count, self._longest, np.int64)
        # A range of all 32 bits makes numpy hand out the generator's numbers as they are.
        draws = self._random.randint(0, 2**32, count, np.uint32).astype(np.int64)
        shortened = SHORTEST_TARGET + draws % (self._longest - 1)
        return np.where(draws % self._ratio == 0, shortened, self._longest)


def _samples_of(
    bounds_U2: NDArray[np.int64],
    lengths: NDArray[np.int32],
    plan: SentencePlan,
    targets: _Targets,
    dtype: type[np.uint32] | type[np.uint64],
) -> NDArray[Any]:
    """[N, 3]: the samples of some documents in order; takes their targets."""
    origin = int(bounds_U2[0, 0])
    sentences = lengths[origin : int(bounds_U2[-1, 1])]
    sums = np.zeros(len(sentences) + 1, np.int64)  # tokens before each sentence
    np.cumsum(sentences, out=sums[1:])
    bounds_U2 = bounds_U2 - origin
    usual_ends = _ends(sums, bounds_U2, plan)
    wanted = targets.ahead(len(sentences) + len(bounds_U2)).tolist()  # never more: a sample has a sentence
    starts: list[int] = []
    counts: list[int] = []
    drawn = 0
    longest, least = plan.longest, plan.least
    for start, stop in bounds_U2.tolist():
        before = len(starts)
        while start < stop:
            starts.append(start)
            target = wanted[drawn]
            drawn += 1
            if target == longest:
                start = usual_ends[start]
            else:
                end = max(int(sums.searchsorted(sums[start] + target)), start + least)
                start = end if end <= stop - 2 else stop
        drawn += 1
        counts.append(len(starts) - before)
    rows = np.empty((len(starts), 3), dtype)
    rows[:, 0] = starts
    rows[:, 0] += dtype(origin)
    rows[:-1, 1] = rows[1:, 0]
    lasts = np.cumsum(counts) - 1
    rows[lasts, 1] = bounds_U2[:, 1] + origin
    places = np.arange(len(starts)) + np.repeat(np.arange(len(counts)), counts)
    rows[:, 2] = targets.ahead(drawn)[places]
    targets.take(drawn)
    return rows


def _ends(sums: NDArray[np.int64], bounds_U2: NDArray[np.int64], plan: SentencePlan) -> list[int]:
    """For each sentence, where a sample of the usual target that starts with it ends.

    At the first sentence by which it is long enough and has enough sentences, if two or more then remain in the
    document; else at the document's end.
    """
    places = np.arange(len(sums) - 1)
    ends = np.searchsorted(sums, sums[:-1] + plan.longest)
    np.maximum(ends, places + plan.least, out=ends)
    # Sentences between usable documents get some end, which nobody asks for.
    documents = np.maximum(np.searchsorted(bounds_U2[:, 0], places, side="right") - 1, 0)
    stops = bounds_U2[documents, 1]
    ends_list: list[int] = np.where(ends <= stops - 2, ends, stops).tolist()
    return ends_list


def shuffle_rows(rows: NDArray[Any], seed: int, *, moved: Callable[[], None] = nothing) -> None:
    """Shuffle the rows of a map in place, as Megatron-LM's C++ does: with mt19937_64(seed + 1), from the end.

    moved: called after each block of rows.
    """
    random = Twister64(seed + 1)
    order = np.arange(len(rows), dtype=np.int64)
    places = order.data
    for high in range(len(rows) - 1, 0, -BLOCK):
        low = max(high - BLOCK, 0)
        divisors = np.arange(high + 1, low + 1, -1, dtype=np.uint64)
        others = (random.draw(len(divisors)) % divisors).tolist()
        for place, other in zip(range(high, low, -1), others, strict=True):
            places[place], places[other] = places[other], places[place]
        moved()
    rows[:] = rows[order]

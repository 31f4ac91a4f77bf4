"""The passages whose vectors have the largest product with a question's: exact, by torch or by FAISS.

Shape letters: Q questions, N passages, R passages at once, D width, K found.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalith.evaluate.embeddings import Embeddings

ROWS_AT_ONCE = 1 << 16

# (embeddings, questions QD, how many) -> their ids and scores, QK, the best first.
Search = Callable[[Embeddings, Tensor, int], tuple[NDArray[np.int64], NDArray[np.float32]]]


def search_exactly(
    embeddings: Embeddings, questions_QD: Tensor, count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """By products in fp32 on the device of the questions, some passages at a time. Equal scores come in any order."""
    count = min(count, len(embeddings))
    questions_QD = questions_QD.float()
    best_QK = questions_QD.new_empty(len(questions_QD), 0)
    rows_QK = torch.empty(len(questions_QD), 0, dtype=torch.int64, device=questions_QD.device)
    for first, vectors_RD in _read(embeddings):
        scores_QR = questions_QD @ torch.from_numpy(vectors_RD).to(questions_QD.device).T
        scores_QK, places_QK = scores_QR.topk(min(count, scores_QR.shape[1]))
        best = torch.cat([best_QK, scores_QK], 1)
        rows = torch.cat([rows_QK, places_QK + first], 1)
        best_QK, kept_QK = best.topk(min(count, best.shape[1]))
        rows_QK = rows.gather(1, kept_QK)
    return embeddings.ids[rows_QK.cpu().numpy()], best_QK.cpu().numpy()


def search_by_faiss(
    embeddings: Embeddings, questions_QD: Tensor, count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """By FAISS's flat index of inner products, on the CPU."""
    import faiss

    index = faiss.IndexFlatIP(embeddings.vectors.shape[1])
    for _, vectors_RD in _read(embeddings):
        index.add(vectors_RD)
    scores_QK, rows_QK = index.search(questions_QD.float().cpu().numpy(), min(count, len(embeddings)))
    return embeddings.ids[rows_QK], scores_QK


def has_faiss() -> bool:
    """Whether FAISS is installed."""
    return find_spec("faiss") is not None


# By name, as --search asks for them.
SEARCHES: dict[str, Search] = {"torch": search_exactly, "faiss": search_by_faiss}


def _read(embeddings: Embeddings) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The vectors in fp32, some rows at a time, each time with the number of the first."""
    for first in range(0, len(embeddings), ROWS_AT_ONCE):
        yield first, embeddings.vectors[first : first + ROWS_AT_ONCE].astype(np.float32)

"""Small token files of sentences, for tests of tasks that read them, and the vocabulary that they are written in."""

from pathlib import Path

import numpy as np

from megalith.data.indexed import IndexedWriter

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = [f"w{number}" for number in range(40)]
PIECES = [f"##p{number}" for number in range(15)]


def write_vocabulary(folder: Path) -> Path:
    """A vocabulary of 60 tokens, a quarter of them pieces that go on with a word."""
    path = folder / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in (*SPECIAL, *WORDS, *PIECES)))
    return path


def write_sentences(folder: Path, *, name: str = "text_sentence", documents: int = 60, seed: int = 3) -> Path:
    """A token file of sentences that count upwards by a step of their document: something to learn."""
    random = np.random.RandomState(seed)
    prefix = folder / name
    first, count = len(SPECIAL), len(WORDS) + len(PIECES)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            step, start = random.randint(1, 4), random.randint(count)
            sentences = []
            for _ in range(random.randint(1, 8)):
                length = random.randint(3, 9)
                sentences.append(first + (start + step * np.arange(length)) % count)
                start += step * length
            writer.add_document(sentences)
    return prefix

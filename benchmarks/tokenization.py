"""Text to token files, end to end, beside the raw batch throughput of the library that does the same tokenization.

    python benchmarks/tokenization.py                all of it, some minutes and 200 MB of disk
    python benchmarks/tokenization.py --quick        a small text, one round
    python benchmarks/tokenization.py --only bpe     one kind: bpe, wordpiece, hugging_face or sentencepiece

Ours is `prepare`: it starts workers, loads the tokenizer, reads JSON lines, tokenizes with nothing known yet, writes
and syncs .bin and .idx and digests them. The library is given texts that are in memory and a tokenizer that is loaded;
its ids stay in memory. Both run in a fresh process on the same cores, in turns; shown are medians and the range.
Figures in CPU-seconds (of all processes and threads together) hardly depend on what else the machine does.

The text is the source code of the Python that runs this, tests included, and the vocabularies are trained on it:
the published ones are a download. What is made once is kept in --directory.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from table import Row, show

GOAL = 0.9  # of the library's throughput
ROUNDS = 5
VOCABULARY = 50257
KINDS = ("bpe", "wordpiece", "hugging_face", "sentencepiece")
LIBRARIES = {
    "bpe": ("tiktoken", "tokenizers"),
    "wordpiece": ("tokenizers",),
    "hugging_face": ("tokenizers",),
    "sentencepiece": ("sentencepiece",),
}
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def read_texts(size: int, *, packages: bool = False) -> list[str]:
    """The sources of this Python (and of the packages installed), mixed, of about size bytes at most."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if packages or name not in ("site-packages", "dist-packages"))
        for name in sorted(names):
            if name.endswith(".py"):
                content = Path(folder, name).read_bytes()
                try:
                    texts.append(content.decode())
                except UnicodeDecodeError:
                    continue  # a test of encodings
    random.Random(0).shuffle(texts)
    chosen: list[str] = []
    for text in texts:
        if size <= 0:
            break
        chosen.append(text)
        size -= len(text.encode())
    return chosen


def make_inputs(directory: Path, texts: Sequence[str]) -> Path:
    """The folder with the text as JSON lines and a vocabulary of every kind trained on it; made once."""
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    folder = directory / f"megalith-tokenization-{hashlib.sha256(content).hexdigest()[:12]}"
    if (folder / "whole").exists():
        return folder
    print(f"making vocabularies in {folder} ...", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.jsonl").write_bytes(content)
    from megalith.data.tokenizer import train_byte_bpe

    train_byte_bpe(texts, VOCABULARY, folder)
    make_wordpiece(folder, texts)
    make_tokenizer_json(folder)
    make_sentencepiece(folder, texts)
    (folder / "whole").touch()
    return folder


def make_wordpiece(folder: Path, texts: Sequence[str]) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    library = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=30522, special_tokens=special, show_progress=False)
    )
    vocabulary = library.get_vocab()
    lines = sorted(vocabulary, key=lambda token: vocabulary[token])
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_tokenizer_json(folder: Path) -> None:
    """The byte-level BPE as the tokenizers library keeps it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.save(str(folder / "tokenizer.json"))


def make_sentencepiece(folder: Path, texts: Sequence[str]) -> None:
    """A unigram model of the usual size; of part of the text, for its training is slow."""
    import sentencepiece

    lines = [line for text in texts[: len(texts) // 8 + 1] for line in text.split("\n") if line]
    with open(folder / "tokenizer.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=32000,
            hard_vocab_limit=False,
            minloglevel=2,
        )


def encode_by_library(kind: str, library: str, folder: Path, threads: int) -> Callable[[list[str]], Any]:
    """The library's fastest call for a batch of texts, with its tokenizer loaded."""
    if library == "tiktoken":
        import tiktoken

        from megalith.data.bpe import byte_symbols

        byte_of = {symbol: number for number, symbol in enumerate(byte_symbols())}
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        del vocabulary["<|endoftext|>"]
        ranks = {bytes(byte_of[character] for character in token): n for token, n in vocabulary.items()}
        encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
        return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=threads)
    if library == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return lambda texts: processor.encode(texts, num_threads=threads)
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    if kind == "wordpiece":
        tokens = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
        model = models.WordPiece({token: n for n, token in enumerate(tokens)}, unk_token="[UNK]")
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda texts: tokenizer.encode_batch_fast(texts, add_special_tokens=False)


class Stopwatch:
    """Wall and CPU seconds of a `with` block, the CPU seconds of finished child processes among them."""

    def __enter__(self) -> Self:
        self._wall, self._cpu = time.perf_counter(), self._cpu_now()
        return self

    def __exit__(self, *_: object) -> None:
        self.cost = {"wall": time.perf_counter() - self._wall, "cpu": self._cpu_now() - self._cpu}

    def _cpu_now(self) -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)


def time_library(kind: str, library: str, folder: Path, threads: int) -> dict[str, float]:
    """What it costs to encode all texts, in this process."""
    with open(folder / "text.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    encode = encode_by_library(kind, library, folder, threads)
    encode(texts[:2])
    with Stopwatch() as watch:
        encode(texts)
    return watch.cost


def time_ours(kind: str, folder: Path, threads: int) -> dict[str, float]:
    """What it costs from JSON lines to token files, in this process and its workers."""
    from megalith.data.prepare import PrepareConfig, prepare

    settings = {
        "bpe": {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "vocab.json", "merge_file": "merges.txt"},
        "wordpiece": {"tokenizer_type": "BertWordPieceLowerCase", "vocab_file": "vocab.txt"},
        "hugging_face": {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "tokenizer.json"},
        "sentencepiece": {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "tokenizer.model"},
    }[kind]
    given = {name: value if name == "tokenizer_type" else str(folder / value) for name, value in settings.items()}
    with tempfile.TemporaryDirectory(dir=folder) as out:
        config = PrepareConfig(
            input=(str(folder / "text.jsonl"),),
            output_prefix=f"{out}/out",
            workers=threads,
            **given,  # type: ignore[arg-type]
        )
        with Stopwatch() as watch:
            prepare(config, quiet=True)
        return watch.cost


def apart(folder: Path, kind: str, who: str, threads: int) -> dict[str, float]:
    """A cost measured in a fresh process that has as many cores as threads."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    done = subprocess.run(
        [sys.executable, __file__, "--time", kind, who, str(threads), "--directory", str(folder)],
        env={**os.environ, "RAYON_NUM_THREADS": str(threads)},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        check=True,
        capture_output=True,
        text=True,
    )
    cost: dict[str, float] = json.loads(done.stdout)
    return cost


def compare(folder: Path, kind: str, threads: int, rounds: int) -> Iterator[Row]:
    """Our throughput beside that of each library, measured in turns."""
    with open(folder / "text.jsonl", encoding="utf-8") as file:
        size = sum(len(json.loads(line)["text"].encode()) for line in file) / 1e6
    costs: dict[str, list[dict[str, float]]] = {who: [] for who in ("ours", *LIBRARIES[kind])}
    for _ in range(rounds):
        for who, measured in costs.items():
            measured.append(apart(folder, kind, who, threads))
    for clock, unit in (("wall", "MB/s"), ("cpu", "MB/CPU-s")):
        speeds = {who: [size / cost[clock] for cost in measured] for who, measured in costs.items()}
        ours = speeds.pop("ours")
        for who, theirs in speeds.items():
            shown = f"{statistics.median(theirs):.1f} ({min(theirs):.1f} to {max(theirs):.1f})"
            yield Row(
                f"{kind} beside {who}",
                statistics.median(ours),
                unit,
                f"{threads} cores, {size:.0f} MB, {rounds} rounds; ours {min(ours):.1f} to {max(ours):.1f}, "
                f"{who} {importlib.metadata.version(who)}: {shown}",
                f">= {GOAL} of {who}",
                statistics.median(ours) / statistics.median(theirs),
            )


def measure(
    *,
    quick: bool = False,
    kinds: Sequence[str] = KINDS,
    directory: Path | None = None,
    rounds: int = ROUNDS,
    packages: bool = False,
) -> list[Row]:
    """All comparisons, on one core and on all."""
    texts = read_texts(2_000_000 if quick else 1 << 40, packages=packages)
    folder = make_inputs(directory or Path(tempfile.gettempdir()), texts)
    rounds = 1 if quick else rounds
    cores = len(os.sched_getaffinity(0))
    return [row for kind in kinds for n in sorted({1, cores}) for row in compare(folder, kind, n, rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small text, one round")
    parser.add_argument("--only", choices=KINDS, action="append", help="kinds to compare; all unless given")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each comparison")
    parser.add_argument("--packages", action="store_true", help="also the sources of all installed packages")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where files are made")
    parser.add_argument("--time", nargs=3, metavar=("KIND", "WHO", "THREADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds = {arguments.rounds}: must be at least 1")
    if arguments.time:
        kind, who, threads = arguments.time
        own = who == "ours"
        folder = arguments.directory
        timed = time_ours(kind, folder, int(threads)) if own else time_library(kind, who, folder, int(threads))
        print(json.dumps(timed))
        return
    rows = measure(
        quick=arguments.quick,
        kinds=arguments.only or KINDS,
        directory=arguments.directory,
        rounds=arguments.rounds,
        packages=arguments.packages,
    )
    if not arguments.json:
        machine = platform.processor() or platform.machine()
        print(f"{machine}, {os.cpu_count()} cores, Python {platform.python_version()}")
    show(rows, as_json=arguments.json)


if __name__ == "__main__":
    main()

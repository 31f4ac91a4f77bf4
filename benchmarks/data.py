"""What the data path costs: tokenizing, writing token files, index maps, blends and batches, as one table.

    python benchmarks/data.py                  all of it, about a minute (tokenizing apart) and 3 GB of disk
    python benchmarks/data.py --quick          small sizes, a few seconds
    python benchmarks/data.py --only index,loader --json

CPU seconds are those of this process, all threads together: they hardly depend on what else the machine does. A ratio
above 1 means that the goal is met, or that the compiled loop beside it is slower; for tokenizing it is our throughput
over the library's.
"""

import argparse
import ctypes
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenization
from numpy.typing import NDArray
from table import Row, show

from megalith.data.blend import blend_order
from megalith.data.causal import CausalBatches, CausalDataset
from megalith.data.index_cache import load_or_build_index_maps
from megalith.data.index_file import encode_index
from megalith.data.index_maps import build_index_maps, count_tokens, locate_samples, plan_epochs, shuffle_documents
from megalith.data.index_maps import shuffle_samples as shuffle_samples_of
from megalith.data.indexed import IndexedDataset, IndexedWriter
from megalith.data.loader import Loader
from megalith.data.order import SingleOrder

SEQUENCE_LENGTH = 1024
VOCABULARY = 50257

# The two loops that a compiled helper would run, written for this comparison.
COMPILED_LOOPS = """
#include <stdint.h>
void locate(const int32_t *lengths, const int32_t *doc_idx, int64_t samples, int32_t s, int32_t *rows) {
    int64_t place = 0;
    int32_t offset = 0;
    rows[0] = rows[1] = 0;
    for (int64_t k = 1; k <= samples; k++) {
        int32_t wanted = s + 1, left;
        while (wanted > (left = lengths[doc_idx[place]] - offset)) {
            wanted -= left;
            place++;
            offset = 0;
        }
        offset += wanted - 1;
        rows[2 * k] = (int32_t)place;
        rows[2 * k + 1] = offset;
    }
}
void blend(const double *weights, int32_t datasets, int64_t size, uint8_t *chosen, int64_t *samples, int64_t *taken) {
    for (int64_t k = 0; k < size; k++) {
        double position = k > 1 ? (double)k : 1.0, most = weights[0] * position - (double)taken[0];
        int32_t best = 0;
        for (int32_t i = 1; i < datasets; i++) {
            double behind = weights[i] * position - (double)taken[i];
            if (behind > most) { most = behind; best = i; }
        }
        chosen[k] = (uint8_t)best;
        samples[k] = taken[best]++;
    }
}
"""


@dataclass(frozen=True)
class Cost:
    """What a piece of work took."""

    wall: float  # seconds
    cpu: float  # seconds
    memory: float  # MB by which the peak of resident memory rose


def cost_of(work: Callable[[], Any]) -> tuple[Any, Cost]:
    """What work gives, and what it took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    cost = time.perf_counter() - wall, time.process_time() - cpu
    return result, Cost(*cost, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def best_of(times: int, work: Callable[[], Any]) -> tuple[Any, Cost]:
    """What work gives, and the least that it took."""
    outcomes = [cost_of(work) for _ in range(times)]
    return outcomes[-1][0], min((cost for _, cost in outcomes), key=lambda cost: cost.cpu)


def at_most(figure: str, value: float, unit: str, conditions: str, goal: float, whose: str = "") -> Row:
    return Row(figure, value, unit, conditions, f"<= {goal:.3g} {unit}{whose}", goal / max(value, 1e-9))


def at_least(figure: str, value: float, unit: str, conditions: str, goal: float) -> Row:
    return Row(figure, value, unit, conditions, f">= {goal:.3g} {unit}", value / goal)


def compiled_loops(directory: Path) -> ctypes.CDLL | None:
    """The loops above, compiled; None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    source, library = directory / "loops.c", directory / "loops.so"
    source.write_text(COMPILED_LOOPS)
    subprocess.run([compiler, "-O3", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def measure_index(directory: Path, *, quick: bool) -> Iterator[Row]:
    """Index maps of a corpus of which only the index exists; its tokens are a file without blocks on the disk."""
    num_documents = 200_000 if quick else 10_000_000
    lengths = np.random.default_rng(0).integers(1, 2000, num_documents, dtype=np.int32)
    tokens = int(lengths.sum(dtype=np.int64))
    corpus = f"{num_documents / 1e6:g} M documents, {tokens / 1e9:.2g} G tokens, s {SEQUENCE_LENGTH}, 1 epoch"
    prefix = directory / "corpus"
    with open(f"{prefix}.idx", "wb") as file:
        file.writelines(encode_index(np.dtype("<u2"), lengths, np.arange(num_documents + 1)))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * tokens)
    num_samples = tokens // SEQUENCE_LENGTH - 1

    def start() -> None:
        load_or_build_index_maps(
            prefix,
            "train",
            documents=range(num_documents),
            lengths=IndexedDataset(prefix).lengths,
            num_samples=num_samples,
            sequence_length=SEQUENCE_LENGTH,
            seed=1234,
        )

    _, cold = cost_of(start)
    result_mb = sum(path.stat().st_size for path in directory.glob("*.npy")) / 1e6
    scale = num_documents / 10_000_000
    built = f"{corpus}; open and check the index, build, write and sync {result_mb:.0f} MB, digest, load"
    yield at_most("index: cold build", cold.cpu, "CPU-s", built, 4 * scale)
    yield Row("index: cold build", cold.wall, "s", built)
    yield at_most("index: peak memory", cold.memory, "MB", built + " (mapped files included)", 3 * result_mb)
    _, warm = cost_of(start)
    yield Row("index: from its files", warm.cpu, "CPU-s", f"{corpus}; every byte of index and maps checked")
    yield from index_phases(directory, lengths, num_samples, corpus)


def index_phases(directory: Path, lengths: NDArray[np.int32], num_samples: int, corpus: str) -> Iterator[Row]:
    """Each step of a build by itself, and the compiled walk beside the one that has to match it."""
    documents = np.arange(len(lengths), dtype=np.int32)
    random = np.random.RandomState(1234)
    tokens, cost = cost_of(lambda: count_tokens(documents, lengths))
    yield Row("index: count tokens", cost.cpu, "CPU-s", corpus)
    plan = plan_epochs(tokens, num_samples=num_samples, sequence_length=SEQUENCE_LENGTH)
    doc_idx, cost = cost_of(lambda: shuffle_documents(documents, plan, random))
    yield Row("index: documents", cost.cpu, "CPU-s", "shuffled in the legacy order, bit for bit")
    sample_idx, cost = best_of(3, lambda: locate_samples(doc_idx, lengths, plan, SEQUENCE_LENGTH))
    shuffle_idx, shuffling = cost_of(lambda: shuffle_samples_of(plan, random))
    loops = compiled_loops(directory)
    if loops is None:
        yield Row("index: samples", cost.cpu, "CPU-s", "no compiler here to compare with")
    else:
        rows = np.empty_like(sample_idx)
        sizes = ctypes.c_int64(plan.samples), SEQUENCE_LENGTH
        _, compiled = best_of(3, partial(loops.locate, pointer(lengths), pointer(doc_idx), *sizes, pointer(rows)))
        assert np.array_equal(rows, sample_idx), "the compiled walk gives other samples"
        yield at_most("index: samples", cost.cpu, "CPU-s", "same rows, the best of 3", compiled.cpu, " (cc -O3)")
    yield Row("index: shuffle", shuffling.cpu, "CPU-s", f"{len(shuffle_idx) / 1e6:g} M samples")


def measure_loader(directory: Path, *, quick: bool) -> Iterator[Row]:
    """Batches from a token file that lies in the operating system's cache."""
    for mean_length in (1000, 100):
        num_tokens = 20_000_000 if quick else 400_000_000
        random = np.random.default_rng(0)
        lengths = random.integers(1, 2 * mean_length, num_tokens // mean_length, dtype=np.int32)
        prefix = directory / f"tokens{mean_length}"
        with IndexedWriter(prefix, np.uint16) as writer:
            tokens = random.integers(0, VOCABULARY, int(lengths.sum()), dtype=np.uint16)
            writer.add_documents(lengths, np.ones(len(lengths), np.int64), tokens)
        indexed = IndexedDataset(prefix)
        indexed.warm_up()
        maps = build_index_maps(
            np.arange(len(lengths), dtype=np.int32),
            indexed.lengths,
            num_samples=len(tokens) // SEQUENCE_LENGTH - 1,
            sequence_length=SEQUENCE_LENGTH,
            seed=1,
        )
        dataset = CausalDataset(indexed, maps, vocab_size=VOCABULARY)
        for reset in (False, True):
            batches = CausalBatches(
                dataset, VOCABULARY - 1, reset_position_ids=reset, reset_attention_mask=reset, eod_mask_loss=reset
            )
            speed = loader_speed(batches, num_steps=len(maps) // 64)
            conditions = f"documents of {mean_length} tokens on average, micro-batch 8 x 8, ids checked, shuffled reads"
            conditions += ", positions and masks reset at EOD" if reset else ""
            yield at_least("loader", speed / 1e6, "M tokens/s", conditions, 50)


def loader_speed(batches: CausalBatches, *, num_steps: int) -> float:
    """Tokens per CPU-second of one process that reads step after step."""
    order = SingleOrder(len(batches))
    with Loader(batches, order, micro_batch_size=8, replica=0, data_parallel=1, prefetch=0) as loader:
        loader.step_batch(0, 8)

        def read_all() -> int:
            return sum(loader.step_batch(64 * step, 8)[0]["tokens"].shape[1] * 64 for step in range(num_steps))

        num_tokens, cost = cost_of(read_all)
    return float(num_tokens / cost.cpu)


def measure_blend(directory: Path, *, quick: bool) -> Iterator[Row]:
    """The order of a blend, and the compiled loop beside it."""
    size = 1_000_000 if quick else 100_000_000
    loops = compiled_loops(directory)
    for num_datasets in (4, 50):
        count = size if num_datasets == 4 else size // 10
        weights = np.random.default_rng(0).dirichlet(np.ones(num_datasets))
        blend, cost = cost_of(partial(blend_order, weights.tolist(), count))
        conditions = f"{count / 1e6:g} M samples of {num_datasets} data sets"
        if loops is None:
            yield Row("blend", cost.cpu, "CPU-s", conditions + ", no compiler here to compare with")
            continue
        chosen, samples = np.empty(count, np.uint8), np.empty(count, np.int64)
        taken = np.zeros(num_datasets, np.int64)
        results = pointer(chosen), pointer(samples), pointer(taken)
        _, compiled = cost_of(partial(loops.blend, pointer(weights), num_datasets, ctypes.c_int64(count), *results))
        assert np.array_equal(chosen, blend.datasets) and np.array_equal(samples, blend.samples), "another order"
        yield at_most("blend", cost.cpu, "CPU-s", conditions, compiled.cpu, " (cc -O3)")


def measure_writer(directory: Path, *, quick: bool) -> Iterator[Row]:
    """Writing a token file of many short documents.

    Megatron-LM's figures are for the index of as many documents, measured on another machine of this size.
    """
    num_documents, length, chunk = (200_000 if quick else 10_000_000), 20, 10_000
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, chunk * length, dtype=np.uint16)
    lengths, ones = np.full(chunk, length), np.ones(chunk, np.int64)

    def write() -> None:
        with IndexedWriter(directory / "written", np.uint16) as writer:
            for _ in range(num_documents // chunk):
                writer.add_documents(lengths, ones, tokens)

    _, cost = cost_of(write)
    scale = num_documents / 10_000_000
    conditions = f"{num_documents / 1e6:g} M documents of {length} tokens, {chunk} at a time, synced"
    yield at_most("writer", cost.cpu, "CPU-s", conditions, 8.9 * scale, " (Megatron-LM, elsewhere)")
    yield at_most("writer: peak memory", cost.memory, "MB", conditions, 1700 * scale, " (Megatron-LM, elsewhere)")


def measure_tokenization(directory: Path, *, quick: bool) -> Iterator[Row]:
    """The rows of the program beside this one."""
    yield from tokenization.measure(quick=quick, directory=directory)


SECTIONS: dict[str, Callable[..., Iterator[Row]]] = {
    "index": measure_index,
    "loader": measure_loader,
    "blend": measure_blend,
    "writer": measure_writer,
    "tokenization": measure_tokenization,
}


def measure_apart(section: str, directory: Path, *, quick: bool) -> list[Row]:
    """The rows of one section, measured in a process of its own, so that peaks of memory are its own."""
    command = [sys.executable, __file__, "--only", section, "--here", "--json", "--directory", str(directory)]
    done = subprocess.run([*command, *(["--quick"] if quick else [])], check=True, stdout=subprocess.PIPE, text=True)
    return [Row(**row) for row in json.loads(done.stdout)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections to measure, of {', '.join(SECTIONS)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where files are made")
    parser.add_argument("--here", action="store_true", help="measure in this process")
    arguments = parser.parse_args()
    sections = arguments.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(SECTIONS)}")
    if not arguments.directory.is_dir():
        parser.error(f"--directory = {arguments.directory}: is no directory")
    rows: list[Row] = []
    for section in sections:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            if arguments.here:
                rows += SECTIONS[section](Path(directory), quick=arguments.quick)
            else:
                rows += measure_apart(section, Path(directory), quick=arguments.quick)
    show(rows, as_json=arguments.json)


if __name__ == "__main__":
    main()

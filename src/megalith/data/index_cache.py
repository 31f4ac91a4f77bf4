"""Index maps, sentence maps and blends kept beside the data (kept_arrays.py), the maps under Megatron-LM's file names.

These names say nothing of the data, so what the maps were made from is recorded beside them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.blend import Blend, blend_order
from megalith.data.index_maps import EpochPlan, IndexMaps, make_arrays, plan_epochs
from megalith.data.indexed import idx_path
from megalith.data.kept_arrays import Build, Kept, Wanted, folder_for, load_or_build
from megalith.data.survey import Survey
from megalith.files import DISK, Disk, Location, digest_of_bytes

ARRAYS = ("doc_idx", "sample_idx", "shuffle_idx")
FORMAT = 1
BLOCK = 1 << 20  # lengths digested at once
FEWEST_KEPT = 1 << 22  # samples of a blend that has files: 38 MB; a smaller one is sooner made than read


@dataclass(frozen=True)
class IndexMapsReport:
    """What happened when index maps were asked for, for whoever prints it."""

    paths: dict[str, Path]  # of each of ARRAYS
    rebuilt_because: str  # empty if they were only loaded
    seconds: dict[str, float]  # of each of ARRAYS, if built: building and saving; wait: for another process; load
    plan: EpochPlan
    num_documents: int  # per epoch
    sequence_length: int


def load_or_build_index_maps(
    prefix: Location,
    part: str,
    *,
    documents: range,
    lengths: NDArray[np.int32],
    num_samples: int,
    sequence_length: int,
    seed: int,
    cache_path: Location | None = None,
    survey: Survey | None = None,
    disk: Disk = DISK,
) -> tuple[IndexMaps, IndexMapsReport]:
    """The maps for a part (train, valid or test) of the token file with this prefix, mapped from their files.

    documents: consecutive items of the part; lengths: of all items. cache_path: a directory for the files instead of
    the data's own. survey: None if nothing is known. Raises ValueError if the documents have no token, and what
    `load_or_build` raises.
    """
    if not 0 <= documents.start <= documents.stop <= len(lengths):
        raise ValueError(f"documents {documents.start} to {documents.stop} are not all among the {len(lengths)} items")
    survey = survey or Survey()
    tokens_per_epoch = tokens_of(prefix, documents, lengths, survey)
    plan = plan_epochs(tokens_per_epoch, num_samples=num_samples, sequence_length=sequence_length)
    made_from = {
        "format": FORMAT,
        "documents": [documents.start, documents.stop],
        "lengths_sha256": digest_of_lengths(prefix, "lengths", documents, lengths, survey),
        "num_samples": num_samples,
        "sequence_length": sequence_length,
        "seed": seed,
    }
    directory = folder_for(prefix, made_from, cache_path)
    base = f"{Path(prefix).name}_{part}_indexmap_{num_samples}ns_{sequence_length}sl_{seed}s"
    wanted = Wanted(
        "index maps",
        made_from,
        {name: directory / f"{base}_{name}.npy" for name in ARRAYS},
        directory / f"{base}_made_from.json",
        directory / f"{base}.lock",
        num_bytes=4 * plan.epochs * len(documents) + (8 + 8) * (plan.samples + 1),
        notes={"epochs": plan.epochs},
        disk=disk,
    )

    def build() -> Iterator[tuple[str, NDArray[Any]]]:
        ids = np.arange(documents.start, documents.stop, dtype=np.int32)
        return make_arrays(ids, lengths, plan, sequence_length=sequence_length, seed=seed)

    kept = load_or_build(wanted, build, survey)
    doc_idx, sample_idx, shuffle_idx = (kept.arrays[name] for name in ARRAYS)
    maps = IndexMaps(doc_idx, sample_idx, shuffle_idx, plan, sequence_length)
    paths = dict(wanted.paths)
    return maps, IndexMapsReport(paths, kept.rebuilt_because, kept.seconds, plan, len(documents), sequence_length)


def load_or_build_sentence_map(
    prefix: Location,
    name: str,
    made_from: Mapping[str, Any],
    build: Build,
    *,
    cache_path: Location | None,
    survey: Survey,
) -> tuple[NDArray[Any], Path, Kept]:
    """A map of sentences of the token file with this prefix, the file it lies in, and how it was come by.

    name: what the file's name says behind the prefix. made_from: all that the map depends on; build gives it as "map".
    """
    directory = folder_for(prefix, made_from, cache_path)
    base = f"{Path(prefix).name}_{name}"
    wanted = Wanted(
        "sentence maps",
        {"format": FORMAT, **made_from},
        {"map": directory / f"{base}.npy"},
        directory / f"{base}_made_from.json",
        directory / f"{base}.lock",
    )
    kept = load_or_build(wanted, build, survey)
    return kept.arrays["map"], wanted.paths["map"], kept


def load_or_build_blend(
    prefix: Location,
    weights: Sequence[float],
    size: int,
    *,
    cache_path: Location | None,
    survey: Survey,
) -> Blend:
    """What `blend_order` gives for these weights and this size; of a large blend mapped from files that are kept.

    prefix: of the token file beside which they lie, unless cache_path names a directory. Raises what `load_or_build`
    raises.
    """
    if size < FEWEST_KEPT:
        return blend_order(weights, size)
    made_from = {"format": FORMAT, "kind": "blend", "weights": list(weights), "size": size}
    directory = folder_for(prefix, made_from, cache_path)
    base = f"{Path(prefix).name}_blend_{size}ns_{digest_of_bytes(json.dumps(made_from))[:16]}"
    arrays = [field.name for field in fields(Blend)]
    wanted = Wanted(
        "blends",
        made_from,
        {name: directory / f"{base}_{name}.npy" for name in arrays},
        directory / f"{base}_made_from.json",
        directory / f"{base}.lock",
        num_bytes=(2 + 8) * size,
    )

    def build() -> Iterator[tuple[str, NDArray[Any]]]:
        blend = blend_order(weights, size)
        survey.moved()
        for name in arrays:
            yield name, getattr(blend, name)

    return Blend(**load_or_build(wanted, build, survey).arrays)


def tokens_of(prefix: Location, items: range, lengths: NDArray[np.int32], survey: Survey) -> int:
    """Tokens of consecutive items of the token file with this prefix; lengths: of all items."""

    def add() -> int:
        return int(lengths[items.start : items.stop].sum(dtype=np.int64))

    return int(survey.find(f"tokens of items {items.start} to {items.stop}", add, idx_path(prefix)))


def digest_of_lengths(prefix: Location, name: str, places: range, table: NDArray[Any], survey: Survey) -> str:
    """SHA-256 of consecutive entries of a table in the .idx of this prefix, whatever integers hold them.

    name: of the table, lengths or documents.
    """

    def digest() -> str:
        sha256 = hashlib.sha256()
        kind = "<i4" if table.dtype == np.int32 else "<i8"
        for begin in range(places.start, places.stop, BLOCK):
            sha256.update(table[begin : min(begin + BLOCK, places.stop)].astype(kind).tobytes())
        return sha256.hexdigest()

    return str(survey.find(f"SHA-256 of {name} {places.start} to {places.stop}", digest, idx_path(prefix)))

"""Whether a checkpoint is what was written: every byte of every file against the digests in its index."""

import errno
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from megalith.checkpoint.directory import check_directory
from megalith.checkpoint.index import INDEX_LIMIT, INDEX_NAME, Index, parse
from megalith.checkpoint.pieces import by_file
from megalith.checkpoint.shards import DamagedError, open_shard, read_file
from megalith.files import DISK, Disk, digest_of
from megalith.ranks import Ranks, RanksError

# Errors that say nothing about the bytes of a file, and what helps.
REMEDIES = {
    errno.EACCES: "correct its permissions",
    errno.EPERM: "correct its permissions",
    errno.EMFILE: "allow the process more open files (ulimit -n)",
    errno.ENFILE: "allow the machine more open files (fs.file-max)",
}


def why_unread(path: Path, error: RanksError | ValueError | OSError) -> str | None:
    """The sentence for a path that could not be read though nothing says that it is damaged; None if something does."""
    if isinstance(error, RanksError):
        codes = {failure.code for failure in error.failures}
    else:
        codes = {getattr(error, "errno", None)}
    if not codes <= REMEDIES.keys():
        return None
    code = next(code for code in REMEDIES if code in codes)
    return f"{path} cannot be read ({os.strerror(code)}): {REMEDIES[code]}"


def verify(path: Path, *, disk: Disk = DISK) -> Index:
    """The index of a checkpoint of which every byte is as it was written.

    Raises DamagedError or OSError, naming the file, if not. Files that the index does not list are not looked at:
    nothing reads them.
    """
    index = read_index(path, disk=disk)
    check_files(path, index, index.files, disk=disk)
    return index


def verified_together(ranks: Ranks, path: Path, *, disk: Disk) -> Index:
    """As `verify`, by all ranks together: each takes a share of the files. RanksError or DamagedError on all alike."""
    index = index_together(ranks, path, disk=disk)
    check_together(ranks, path, index, disk=disk)
    return index


def index_together(ranks: Ranks, path: Path, *, disk: Disk) -> Index:
    """As `read_index`, by all ranks together: one reads. RanksError or DamagedError on all alike."""
    texts: list[bytes] = []

    def read() -> None:
        if ranks.rank == 0:
            texts.append(index_text(path, disk=disk))

    ranks.together(read)
    # Not as text, for a damaged file need not be UTF-8.
    return index_in(path, bytes.fromhex(ranks.from_first(texts[0].hex() if texts else "")))


def check_together(ranks: Ranks, path: Path, index: Index, *, disk: Disk) -> None:
    """As `check_files` for all files, of which each rank takes a share. RanksError on all alike."""
    own = sorted(index.files)[ranks.rank :: ranks.size]
    ranks.together(lambda: check_files(path, index, own, disk=disk))


def read_index(path: Path, *, disk: Disk = DISK) -> Index:
    """What a checkpoint holds, its tensors' bytes unread. Raises DamagedError or OSError if that cannot be known."""
    return index_in(path, index_text(path, disk=disk))


def index_text(path: Path, *, disk: Disk) -> bytes:
    """The bytes of a checkpoint's index file."""
    check_directory(path)
    with _there(path / INDEX_NAME):
        return read_file(path / INDEX_NAME, INDEX_LIMIT, disk=disk)


@contextmanager
def _there(path: Path) -> Iterator[None]:
    """A file that is not there is damage, too."""
    try:
        yield
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None


def index_in(path: Path, text: bytes) -> Index:
    """The index of the checkpoint of that path in the bytes of its index file."""
    index = parse(path / INDEX_NAME, text)
    if not path.name.endswith(f"-{index.step:07d}"):
        raise DamagedError(f"{path / INDEX_NAME} is of step {index.step}, not of this directory's")
    return index


def check_files(path: Path, index: Index, names: Collection[str], *, disk: Disk) -> None:
    """Raise DamagedError or OSError unless the named files of a checkpoint are what its index says."""
    held = by_file(index.tensors, set(names))
    for name in names:
        with _there(path / name):
            found, expected = digest_of(path / name, disk=disk), index.files[name]
        if found.size != expected.size:
            raise DamagedError(f"{path / name} has {found.size} bytes, expected {expected.size}")
        if found.digest != expected.digest:
            raise DamagedError(f"{path / name} was changed: its SHA-256 is {found.digest}, expected {expected.digest}")
        listed = {tensor: (index.tensors[tensor].dtype, place.extent) for tensor, place in held.get(name, {}).items()}
        with open_shard(path / name, disk=disk) as shard:
            if {tensor: shard.kind(tensor) for tensor in shard.names} != listed:
                raise DamagedError(f"{path / name} holds other tensors than the index says")

"""Files that another program wrote with torch.save, read in a process of their own.

Such a file is a program for Python's unpickler. Here it is read by torch's restricted one, which builds tensors, plain
values and the few classes listed below and refuses everything else by name; there is no other way to read it, whatever
the file says. The process that reads has little memory and time, no network, and cannot start another; it hands over
what it read as JSON and safetensors, which the caller then reads as data.
"""

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megalith.checkpoint.pieces import DTYPES, TORCH_DTYPES, Place
from megalith.checkpoint.shards import DamagedError, ShardReader, open_shard, read_file, regular_size, write_shard
from megalith.files import DISK, write_whole
from megalith.launch import as_program

TREE_NAME, TENSORS_NAME, MESSAGES_NAME = "tree.json", "tensors.safetensors", "messages"
# The first torch whose restricted unpickler has no known hole (CVE-2026-24747).
OLDEST_TORCH = (2, 10)
DEPTH_LIMIT = 64  # nested values
TREE_LIMIT = 64 << 20  # bytes of JSON
SPARE_MEMORY = 1 << 30  # bytes beside what the file itself needs
SPARE_FILE = 64 << 20  # bytes
SPARE_SECONDS = 60  # of processor time
BYTES_PER_SECOND = 10 << 20  # slowest disk and processor that are waited for
# What the reading process may not do, by the names of Python's audit events.
FORBIDDEN_EVENTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.")
# What the reading process sees of the environment.
ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV")
REFUSED_NAME = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module)|but got <class '([^']+)'>")


class TensorRef(NamedTuple):
    """A tensor of a foreign file that has not been read yet."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ForeignFile:
    """What a foreign file holds: dicts, lists, plain values, and a TensorRef for each tensor.

    Namespaces and ordered dicts are dicts here, tuples and arrays are lists, number types are names ("torch.float16").
    """

    path: Path
    tree: Any
    _shard: ShardReader

    def read(self, ref: TensorRef) -> Tensor:
        """A tensor. Raises OSError or DamagedError."""
        tensor = torch.empty(ref.shape, dtype=ref.dtype)
        if tensor.numel():
            self._shard.fill(ref.name, Place((0,) * len(ref.shape), ref.shape), tensor)
        return tensor


@contextmanager
def open_foreign(path: Path, *, scratch: Path | None = None) -> Iterator[ForeignFile]:
    """What is in a file that torch.save wrote; tensors are read one by one while the `with` block lasts.

    scratch: an existing directory for a copy of the file's tensors, which is gone afterwards; None for the system's.
    Raises OSError, or DamagedError, naming the file, if it is damaged or holds anything but tensors and plain values.
    """
    with tempfile.TemporaryDirectory(prefix="megalith-read-", dir=scratch) as folder:
        target = Path(folder)
        _check_regular(path)
        _run_reader(path, target)
        tree = json.loads(read_file(target / TREE_NAME, TREE_LIMIT, disk=DISK))
        with open_shard(target / TENSORS_NAME, disk=DISK) as shard:
            yield ForeignFile(path, _decoded(tree, shard), shard)


def _check_regular(path: Path) -> None:
    descriptor = DISK.open(path)
    try:
        regular_size(path, descriptor)
    finally:
        DISK.close(descriptor)


def _run_reader(path: Path, target: Path) -> None:
    """Read the file in a process of its own, which writes into target."""
    words = as_program("megalith.checkpoint.foreign", str(path.absolute()), str(target))
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    with open(target / MESSAGES_NAME, "wb") as messages:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=messages,
            stderr=messages,
            env={**environment, "OMP_NUM_THREADS": "1"},
            check=False,
        )
    if done.returncode != 0:
        said = (target / MESSAGES_NAME).read_text(encoding="utf-8", errors="replace")
        raise DamagedError(f"{path} {_reason(done.returncode, said)}")


def _reason(status: int, said: str) -> str:
    """Why a file could not be read, from what the reading process left."""
    if refused := REFUSED_NAME.search(said):
        name = _printable(refused[1] or refused[2])
        return f"was refused: it holds {name}, and only tensors and plain values are read from such a file"
    if status < 0:
        return f"cannot be read: it is damaged, or made to need too much memory or time (signal {-status})"
    spoken = [line for line in said.splitlines() if re.match(r"[\w.]+(Error|Exception): ", line)]
    words = _printable((spoken or said.splitlines() or ["no reason given"])[-1])
    return f"cannot be read, it is cut short, damaged or no checkpoint ({words})"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:400])


def main(words: list[str]) -> int:
    """Read a file (first word) and write what it holds into a directory (second word)."""
    source, target = Path(words[0]), Path(words[1])
    check_torch(torch.__version__)
    size = source.stat().st_size
    limit_resources(size)
    sys.addaudithook(_refuse_event)
    tensors: dict[str, Tensor] = {}
    tree = _encoded(_load(source), tensors, "", DEPTH_LIMIT)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if needed > 2 * size + SPARE_FILE:
        raise ValueError(f"its tensors take {needed} bytes, but it has only {size}")
    write_shard(target / TENSORS_NAME, tensors, disk=DISK)
    write_whole(target / TREE_NAME, json.dumps(tree, allow_nan=False))
    return 0


def check_torch(version: str) -> None:
    """Raise ValueError for a torch whose restricted unpickler can be broken out of."""
    found = re.match(r"([0-9]+)\.([0-9]+)", version)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ValueError(f"torch {version} cannot read foreign files safely: install torch {oldest} or newer")


def limit_resources(size: int) -> None:
    """Let this process use what reading a file of that many bytes needs, and not much more."""
    limits = {
        resource.RLIMIT_FSIZE: 2 * size + 2 * SPARE_FILE,
        resource.RLIMIT_CPU: SPARE_SECONDS + size // BYTES_PER_SECOND,
        resource.RLIMIT_CORE: 0,
    }
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        used = int(statistics.read_text().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = used + 4 * size + SPARE_MEMORY
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _refuse_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(FORBIDDEN_EVENTS):
        raise PermissionError(f"{event} is not allowed while a foreign file is read")


def _load(source: Path) -> Any:
    """The objects in a file. Raises whatever the damage makes torch raise: the process ends with it."""
    # The state of numpy's generator is an array of unsigned 32-bit numbers; newer and older numpy name its parts
    # differently.
    rebuild: Any = np.empty(0).__reduce__()[0]
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    allowed: list[Any] = [
        argparse.Namespace,
        np.ndarray,
        np.dtype,
        type(np.dtype("uint32")),
        *((rebuild, name) for name in names),
    ]
    with torch.serialization.safe_globals(allowed):
        return torch.load(source, map_location="cpu", weights_only=True)


def _encoded(value: Any, tensors: dict[str, Tensor], where: str, depth: int) -> Any:
    """A value as JSON; its tensors are put into `tensors`, in place. Raises ValueError for what is not plain."""
    if depth == 0:
        raise ValueError(f"{where} is nested more than {DEPTH_LIMIT} deep")
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        return {"tensor": _kept(value, tensors, where)}
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        return {"list": value.reshape(-1).tolist()}
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        if not all(type(key) in (str, int) for key in value):
            raise ValueError(f"{where} has keys that are neither text nor numbers")
        return {"dict": [[k, _encoded(v, tensors, f"{where}/{k}", depth - 1)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_encoded(v, tensors, f"{where}/{i}", depth - 1) for i, v in enumerate(value)]}
    raise ValueError(f"{where} is a {type(value).__name__}, and only tensors and plain values are read")


def _kept(tensor: Tensor, tensors: dict[str, Tensor], where: str) -> str:
    """The name under which a tensor is handed over."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"{where} is a sparse, quantized or empty-bodied tensor, which is not read")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{where} is a tensor of {tensor.dtype}, which is not read")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{where} claims {tensor.numel()} elements, more than it holds")
    name = f"t{len(tensors)}"
    tensors[name] = tensor
    return name


def _decoded(value: Any, shard: ShardReader) -> Any:
    """The value that `_encoded` made JSON of."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float(content)
    if kind == "list":
        return [_decoded(item, shard) for item in content]
    if kind == "dict":
        return {key: _decoded(item, shard) for key, item in content}
    found = shard.kind(content)
    assert found is not None, "the reading process wrote both"
    return TensorRef(content, TORCH_DTYPES[found[0]], found[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

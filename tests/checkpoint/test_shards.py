"""Files of tensors: readable by the safetensors library, read in slices, refused if unsound."""

import json
import os
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from megalith.checkpoint import shards
from megalith.checkpoint.pieces import DTYPES, Place
from megalith.checkpoint.shards import DamagedError, open_shard, shard_size, write_shard
from megalith.files import DISK, Disk, digest_of


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"of.{name}": torch.randint(0, 2, (5, 3), generator=generator).to(dtype) for dtype, name in DTYPES.items()
    }
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["strided"] = torch.randn(6, 4, generator=generator).t()
    return tensors


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = some_tensors()
    written = write_shard(tmp_path / "a", tensors, disk=DISK)
    assert written == digest_of(tmp_path / "a")
    assert written.size == shard_size({name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()})
    read = safetensors.torch.load_file(tmp_path / "a")
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name].double(), value.double()), name


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {name: value.contiguous() for name, value in some_tensors().items()}
    safetensors.torch.save_file(tensors, tmp_path / "a")
    with open_shard(tmp_path / "a", disk=DISK) as shard:
        assert sorted(shard.names) == sorted(tensors)
        for name, value in tensors.items():
            assert shard.kind(name) == (DTYPES[value.dtype], tuple(value.shape))
            if value.numel():
                target = torch.zeros_like(value)
                shard.fill(name, Place((0,) * value.dim(), tuple(value.shape)), target)
                assert torch.equal(target.double(), value.double()), name


class CountingDisk(Disk):
    """Counts the bytes that are read."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def read(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        # A part at a time, as a disk may give it.
        count = super().read(descriptor, buffer[: max(1, len(buffer) // 2)], offset)
        self.num_bytes += count
        return count


@pytest.mark.parametrize("block, seek", [(4 << 20, 1 << 20), (64, 16), (1, 1), (256, 8)])
def test_every_slice_is_read_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, seek: int
) -> None:
    monkeypatch.setattr(shards, "BLOCK", block)
    monkeypatch.setattr(shards, "SEEK", seek)
    random.seed(block)
    whole = {"w": torch.randn(7, 5, 6), "v": torch.randn(40).half(), "m": torch.randn(9, 8)}
    write_shard(tmp_path / "a", whole, disk=DISK)
    with open_shard(tmp_path / "a", disk=CountingDisk()) as shard:
        for _ in range(60):
            name = random.choice(sorted(whole))
            offset = tuple(random.randrange(size) for size in whole[name].shape)
            extent = tuple(
                random.randint(1, size - start) for start, size in zip(offset, whole[name].shape, strict=True)
            )
            place = Place(offset, extent)
            expected = whole[name][place.slices((0,) * len(offset))]
            # Into a part of something larger, as the loader does.
            target = torch.zeros([size + 1 for size in extent], dtype=expected.dtype)[tuple(slice(n) for n in extent)]
            shard.fill(name, place, target)
            assert torch.equal(target, expected)


def test_only_what_is_wanted_of_long_rows_is_read(tmp_path: Path) -> None:
    whole = {"w": torch.arange(4 * 1_000_000, dtype=torch.float32).view(4, 1_000_000)}
    write_shard(tmp_path / "a", whole, disk=DISK)
    disk = CountingDisk()
    with open_shard(tmp_path / "a", disk=disk) as shard:
        header = disk.num_bytes
        target = torch.zeros(2, 1000)
        shard.fill("w", Place((1, 5000), (2, 1000)), target)
        assert torch.equal(target, whole["w"][1:3, 5000:6000])
        assert disk.num_bytes - header == 2 * 1000 * 4


def header_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


GOOD = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "header, size, message",
    [
        (GOOD, 7, "take 8 bytes, the file has 7"),
        (GOOD, 9, "take 8 bytes, the file has 9"),
        ({"w": {**GOOD["w"], "data_offsets": [0, 4]}}, 4, "does not fit"),
        ({"w": {**GOOD["w"], "data_offsets": [8, 0]}}, 8, "does not fit"),
        ({"w": {**GOOD["w"], "data_offsets": [4, 12]}}, 12, "gap or overlap"),
        ({**GOOD, "v": GOOD["w"]}, 8, "gap or overlap"),
        ({"w": {**GOOD["w"], "shape": [1 << 63]}}, 8, "not one of safetensors"),
        ({"w": {**GOOD["w"], "shape": [1 << 40, 1 << 40]}}, 8, "does not fit"),
        ({"w": {**GOOD["w"], "shape": [-2]}}, 8, "not one of safetensors"),
        ({"w": {**GOOD["w"], "shape": [2.0]}}, 8, "not one of safetensors"),
        ({"w": {**GOOD["w"], "shape": [1] * 17}}, 8, "not one of safetensors"),
        ({"w": {**GOOD["w"], "dtype": "O"}}, 8, "not one of safetensors"),
        ({"w": {**GOOD["w"], "dtype": ["F32"]}}, 8, "not one of safetensors"),
        ({"w": {**GOOD["w"], "extra": 1}}, 8, "not one of safetensors"),
        ({"w": [1]}, 8, "not one of safetensors"),
        ({"../../w": GOOD["w"]}, 8, "which no checkpoint contains"),
        ([], 0, "not a JSON object"),
        (b"{" * 100_000, 0, "not JSON"),
        (b'{"w":' * 100_000, 0, "not JSON"),
        (b"\xff\xfe", 0, "not JSON"),
        (b"", 0, "not JSON"),
    ],
)
def test_an_unsound_header_is_refused(tmp_path: Path, header: object, size: int, message: str) -> None:
    path = header_file(tmp_path / "a", header, bytes(size))
    with pytest.raises(DamagedError, match=message) as raised, open_shard(path, disk=DISK):
        pass
    assert str(path) in str(raised.value)


def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for length in (1, 1000, 1 << 40, (1 << 64) - 1):
        (tmp_path / "a").write_bytes(length.to_bytes(8, "little"))
        with pytest.raises(DamagedError, match="header of"), open_shard(tmp_path / "a", disk=DISK):
            pass
    (tmp_path / "a").write_bytes(b"1234567")
    with pytest.raises(DamagedError, match="too short"), open_shard(tmp_path / "a", disk=DISK):
        pass


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    header_file(tmp_path / "file", GOOD, bytes(8))
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("pipe", "directory"):
        with pytest.raises(DamagedError, match="not a regular file"), open_shard(tmp_path / name, disk=DISK):
            pass
    for name in ("link", "missing"):
        with pytest.raises(OSError, match=name), open_shard(tmp_path / name, disk=DISK):
            pass


def test_a_file_cut_short_while_open_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", {"w": torch.zeros(100)}, disk=DISK)
    with open_shard(tmp_path / "a", disk=DISK) as shard:
        os.truncate(tmp_path / "a", 100)
        with pytest.raises(DamagedError, match="bytes too early"):
            shard.fill("w", Place((0,), (100,)), torch.zeros(100))


def test_mutated_files_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    random.seed(1)
    write_shard(tmp_path / "a", {"w": torch.zeros(3, 4), "v": torch.ones(5).bool()}, disk=DISK)
    original = (tmp_path / "a").read_bytes()
    refused = 0
    for _ in range(500):
        data = bytearray(original)
        for _ in range(random.randint(1, 3)):
            data[random.randrange(len(data))] = random.randrange(256)
        if random.random() < 0.2:
            del data[random.randrange(len(data)) :]
        (tmp_path / "a").write_bytes(data)
        try:
            with open_shard(tmp_path / "a", disk=DISK) as shard:
                for name in shard.names:
                    shard.kind(name)
        except DamagedError:
            refused += 1
    assert refused > 150

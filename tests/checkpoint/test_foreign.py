"""Foreign files are data or they are refused: no payload runs, no damage is read, nothing but tensors comes through."""

import argparse
import ast
import builtins
import os
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megalith
from megalith.checkpoint import foreign
from megalith.checkpoint.foreign import check_torch, open_foreign
from megalith.checkpoint.shards import DamagedError
from tests.checkpoint.forked_reader import forked_reader

__all__ = ["forked_reader"]


class Payload:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def payloads(canary: Path) -> dict[str, Any]:
    """Each would create the canary file if anything of it ran."""
    touch = f"open({str(canary)!r}, 'w').close()"
    system = Payload(os.system, f"touch {canary}")
    objects = np.empty(1, dtype=object)
    objects[0] = system
    return {
        "system": {"model": system},
        "builtin": {"model": Payload(builtins.eval, touch)},
        "statement": {"args": argparse.Namespace(lr=Payload(builtins.exec, touch))},
        "process": {"optimizer": {"state": [Payload(subprocess.call, ["touch", str(canary)])]}},
        "key": {Payload(builtins.eval, touch + " or 1"): 1},
        "generator": {"np_rng_state": ("MT19937", objects, 1)},
        "import": {"a": Payload(builtins.__import__, "this")},
        "open": {"a": Payload(builtins.open, str(canary), "w")},
    }


def test_plain_values_and_tensors_come_through_the_real_process(tmp_path: Path) -> None:
    table = torch.arange(12.0).view(3, 4)
    numbers: Any = np.random.RandomState(3).get_state()
    saved: dict[str, Any] = {
        "args": argparse.Namespace(lr=1.5e-4, dtype=torch.float16, path=["a"], nothing=None, on=True),
        "np": numbers,
        "pairs": OrderedDict([("a", (1, 2)), ("b", float("inf"))]),
        "state": {0: {"half": table.half(), "part": table[:, 1:3]}, 1: {"scalar": torch.tensor(7, dtype=torch.int64)}},
    }
    torch.save(saved, tmp_path / "x.pt")
    with open_foreign(tmp_path / "x.pt", scratch=tmp_path) as file:
        state: Any = file.tree.pop("state")
        assert file.tree.pop("np")[:2] == ["MT19937", numbers[1].tolist()]
        assert file.tree == {
            "args": {"lr": 1.5e-4, "dtype": "torch.float16", "path": ["a"], "nothing": None, "on": True},
            "pairs": {"a": [1, 2], "b": float("inf")},
        }
        assert state[0]["part"][1:] == (torch.float32, (3, 2))
        assert torch.equal(file.read(state[0]["part"]), table[:, 1:3])
        assert torch.equal(file.read(state[0]["half"]), table.half())
        assert int(file.read(state[1]["scalar"])) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_a_payload_does_not_run_in_the_real_process_and_is_named(tmp_path: Path) -> None:
    path, canary = tmp_path / "x.pt", tmp_path / "canary"
    torch.save({"model": Payload(os.system, f"touch {canary}")}, path)
    with (
        pytest.raises(DamagedError, match=r"x\.pt was refused: it holds posix\.system, and only tensors"),
        open_foreign(path),
    ):
        pass
    assert not canary.exists()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("kind", sorted(payloads(Path("x"))))
def test_no_payload_runs(kind: str, is_zip: bool, tmp_path: Path, forked_reader: None) -> None:
    path, canary = tmp_path / "x.pt", tmp_path / "canary"
    torch.save(payloads(canary)[kind], path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(DamagedError, match=r"x\.pt (was refused|cannot be read)"), open_foreign(path, scratch=tmp_path):
        pass
    assert not canary.exists()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
def test_a_truncated_file_is_refused_by_name(is_zip: bool, tmp_path: Path, forked_reader: None) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.randn(1000)}, path, _use_new_zipfile_serialization=is_zip)
    data = path.read_bytes()
    for share in (0.0, 0.3, 0.9, 0.999):
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(DamagedError, match=r"x\.pt (was refused|cannot be read)"), open_foreign(path):
            pass


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch 2.11 and 2.12
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3).to_sparse(), "sparse, quantized or empty-bodied"),
        (torch.zeros(1).expand(10_000_000), "claims 10000000 elements, more than it holds"),
        (torch.zeros(2, dtype=torch.complex64), "a tensor of torch.complex64"),
        (torch.zeros(2, device="meta"), "sparse, quantized or empty-bodied"),
        ({(1, 2): 3}, "keys that are neither text nor numbers"),
        (3 + 4j, "is a complex|cannot be read|refused"),
    ],
)
def test_what_is_no_plain_tensor_or_value_is_refused(
    value: Any, message: str, tmp_path: Path, forked_reader: None
) -> None:
    torch.save({"a": value}, tmp_path / "x.pt")
    with pytest.raises(DamagedError, match=message), open_foreign(tmp_path / "x.pt"):
        pass


def test_values_nested_too_deeply_are_refused(tmp_path: Path, forked_reader: None) -> None:
    value: Any = 1
    for _ in range(100):
        value = [value]
    torch.save({"a": value}, tmp_path / "x.pt")
    with pytest.raises(DamagedError, match="nested more than 64 deep"), open_foreign(tmp_path / "x.pt"):
        pass


def test_many_names_of_one_large_tensor_are_refused(tmp_path: Path, forked_reader: None) -> None:
    large = torch.zeros(1 << 20)
    torch.save([large] * 40, tmp_path / "x.pt")
    with pytest.raises(DamagedError, match="its tensors take 167772160 bytes"), open_foreign(tmp_path / "x.pt"):
        pass


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(
    tmp_path: Path, forked_reader: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 256 << 20
    monkeypatch.setattr(foreign, "SPARE_MEMORY", size // 2)
    torch.save({"a": torch.zeros(1)}, tmp_path / "small.pt")
    with (
        zipfile.ZipFile(tmp_path / "small.pt") as small,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
    ):
        for name in small.namelist():
            if name.endswith("data.pkl"):
                # The storage of one element becomes a large one.
                before, after = b"cpuq\x06K\x01", b"cpuq\x06J" + (size // 4).to_bytes(4, "little")
                assert before in small.read(name)
                bomb.writestr(name, small.read(name).replace(before, after))
            elif name.endswith("data/0"):
                with bomb.open(name, "w", force_zip64=True) as member:
                    for _ in range(size >> 24):
                        member.write(bytes(1 << 24))
            else:
                bomb.writestr(name, small.read(name))
    assert (tmp_path / "x.pt").stat().st_size < size // 64
    with (
        pytest.raises(DamagedError, match=r"not enough memory|Cannot allocate|signal"),
        open_foreign(tmp_path / "x.pt"),
    ):
        pass


def test_a_directory_and_a_link_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "x.pt").mkdir()
    with pytest.raises(DamagedError, match="is not a regular file"), open_foreign(tmp_path / "x.pt"):
        pass
    (tmp_path / "y.pt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"y\.pt"), open_foreign(tmp_path / "y.pt"):
        pass


@pytest.mark.parametrize("version", ["2.9.1", "1.13", "unknown"])
def test_a_torch_with_a_hole_in_its_unpickler_is_refused(version: str) -> None:
    with pytest.raises(ValueError, match=r"install torch 2\.10 or newer"):
        check_torch(version)
    check_torch("2.10.0")
    check_torch("2.13.0+cpu")


def test_the_only_unpickler_is_the_restricted_one() -> None:
    """No argument, no variable and no second try decides about it."""
    calls = [
        node
        for path in Path(megalith.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("torch.load")
    ]
    assert [ast.unparse(call) for call in calls] == ["torch.load(source, map_location='cpu', weights_only=True)"]


@pytest.mark.parametrize("event", ["socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.fork"])
def test_the_reading_process_may_not_start_others_or_reach_the_network(event: str) -> None:
    with pytest.raises(PermissionError, match=f"{event} is not allowed while a foreign file is read"):
        foreign._refuse_event(event, ())
    foreign._refuse_event("open", ("x", "r", 0))

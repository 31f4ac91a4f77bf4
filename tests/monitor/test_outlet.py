"""What a run says never stops it, and never does anything to the terminal that shows it."""

import io
import json
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalith.monitor import outlet as outlet_module
from megalith.monitor.events import MemoryReported, RankMemory, Warned
from megalith.monitor.memory import MemoryUse
from megalith.monitor.outlet import JsonLines, Outlet, json_line, plain, record_of
from megalith.terminal import printable
from tests.records import read_records


@contextmanager
def disk_that_holds(size: int) -> Iterator[None]:
    """No file of this process may grow beyond size bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("loss 2.5 | größer \U0001f600", "loss 2.5 | größer \U0001f600"),
        ("\x1b]0;owned\x07\x1b[2J", "\\x1b]0;owned\\x07\\x1b[2J"),
        ("a\rb\nc", "a\\rb\\nc"),
        ("a\tb", "a\tb"),
        ("\x9b31m \x7f", "\\x9b31m \\x7f"),
        ("abc\u202edcba\u2066", "abc\\u202edcba\\u2066"),
        ("\udcff", "\\udcff"),
    ],
)
def test_printable_text_keeps_letters_and_shows_controls_as_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(alphabet=st.characters(codec=None)))
def test_whatever_the_data_one_line_stays_one_line_and_holds_no_control(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert all(letter == "\t" or (ord(letter) >= 32 and not 127 <= ord(letter) < 160) for letter in shown)
    shown.encode("utf-8")


def test_characters_that_the_stream_lacks_are_written_as_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Outlet(stream, pytest.fail).write("größer")
    assert raw.getvalue() == b"gr\\xf6\\xdfer"


def test_a_reader_that_went_away_is_told_once_and_does_not_matter() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    told: list[str] = []
    with os.fdopen(writing, "w") as stream:
        outlet = Outlet(stream, told.append)
        for _ in range(3):
            outlet.write("hello\n")
        print("nor does anyone else who writes there", file=stream, flush=True)
    assert len(told) == 1 and "Broken pipe" in told[0]


def test_a_closed_stream_is_told_once() -> None:
    stream = io.StringIO()
    stream.close()
    told: list[str] = []
    outlet = Outlet(stream, told.append)
    outlet.write("a")
    outlet.write("b")
    assert told == ["it is closed"] and not outlet.isatty()


def test_a_full_disk_behind_the_stream_is_told_once_and_writing_goes_on_when_there_is_room(tmp_path: Path) -> None:
    told: list[str] = []
    path = tmp_path / "out"
    with path.open("w") as stream:
        outlet = Outlet(stream, told.append)
        with disk_that_holds(8):
            outlet.write("0123456\n")
            outlet.write("lost\n")
            outlet.write("lost\n")
        outlet.write("after\n")
    assert len(told) == 1 and "too large" in told[0]
    assert path.read_text() == "0123456\nafter\n"


def test_lines_stand_in_the_order_in_which_they_and_others_were_written(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as stream:
        outlet = Outlet(stream, pytest.fail)
        print("first", file=stream)
        outlet.write("second\n")
        print("third", file=stream)
    assert (tmp_path / "out").read_text() == "first\nsecond\nthird\n"


def test_a_full_pipe_that_does_not_block_is_waited_for_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlet_module, "PATIENCE", 0.01)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    told: list[str] = []
    with os.fdopen(writing, "w") as stream:
        outlet = Outlet(stream, told.append)
        outlet.write("x" * (1 << 20))
        assert len(told) == 1
        taken = len(os.read(reading, 1 << 20))
        outlet.write("y")
        assert taken > 0 and os.read(reading, 1 << 20).endswith(b"y")
    os.close(reading)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_behind_the_file_is_told_once() -> None:
    told: list[str] = []
    file = JsonLines(Path("/dev/full"), told.append)
    file.write("{}")
    file.write("{}")
    file.close()
    assert len(told) == 1 and "No space left" in told[0]


def test_a_file_says_how_many_lines_a_full_disk_cost(tmp_path: Path) -> None:
    told: list[str] = []
    path = tmp_path / "log.jsonl"
    file = JsonLines(path, told.append)
    with disk_that_holds(20):
        for number in range(4):
            file.write(json.dumps({"event": number}))
    file.write(json.dumps({"event": "after"}))
    file.write(json.dumps({"event": "and"}))
    file.close()
    records, damaged = read_records(path)
    assert [record["event"] for record in records] == [0, "lines_lost", "after", "and"]
    assert records[1]["lines"] == 3 and damaged == 0 and len(told) == 1


def test_a_line_that_a_full_disk_cut_short_is_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    file = JsonLines(path, lambda reason: None)
    with disk_that_holds(20):
        for number in range(4):
            file.write(json.dumps({"event": number}))
        file.close()
    assert path.read_text() == '{"event": 0}\n'


LONG = b'{"event": "long", "text": "' + b"x" * 200_000  # of several blocks


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        (b'{"event": "b", "lo', []),
        (b'{"event": "b"}', ["b"]),
        (LONG, []),
        (LONG + b'"}', ["long"]),
        (b"12", []),
        (b"\0" * 3_000_000, []),
        (b"\xff", []),
        (b"[" * 100_000, []),
        (b"", []),
    ],
    ids=["torn", "whole", "long", "long and whole", "no object", "zeros", "no text", "brackets", "nothing"],
)
@pytest.mark.parametrize("first", [b"", b'{"event": "a"}\n'], ids=["first line", "later line"])
def test_a_line_that_a_kill_cut_short_is_removed_and_a_whole_one_is_ended(
    first: bytes, tail: bytes, kept: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(first + tail)
    file = JsonLines(path, pytest.fail)
    file.write('{"event": "c"}')
    file.close()
    records, damaged = read_records(path)
    assert [record["event"] for record in records] == [*(["a"] if first else []), *kept, "c"] and damaged == 0
    assert path.read_bytes().endswith(b'\n{"event": "c"}\n' if first or kept else b'{"event": "c"}\n')


def test_a_link_in_the_place_of_the_file_is_told_and_what_it_points_at_stays(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("no line of ours")
    (tmp_path / "log.jsonl").symlink_to("other")
    told: list[str] = []
    file = JsonLines(tmp_path / "log.jsonl", told.append)
    file.write("{}")
    file.close()
    assert (tmp_path / "other").read_text() == "no line of ours" and len(told) == 1


def test_a_named_pipe_in_the_place_of_the_file_is_told_once_it_is_full(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.jsonl")
    told: list[str] = []
    file = JsonLines(tmp_path / "log.jsonl", told.append)
    for _ in range(40):
        file.write("x" * 4096)
    file.close()
    assert len(told) == 1


def test_what_is_longer_than_any_record_is_not_searched_to_its_start(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with path.open("wb") as hollow:
        hollow.truncate(1 << 40)
    file = JsonLines(path, pytest.fail)
    file.write("{}")
    file.close()
    with path.open("rb") as written:
        written.seek(1 << 40)
        assert written.read() == b"\n{}\n"


def test_a_directory_that_cannot_be_made_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told: list[str] = []
    file = JsonLines(tmp_path / "file" / "log.jsonl", told.append)
    file.write("{}")
    file.write("{}")
    assert len(told) == 1 and str(tmp_path / "file") in told[0]


def test_numbers_are_kept_whole_and_those_that_json_lacks_by_name() -> None:
    values = {"a": 0.1 + 0.2, "b": math.nan, "c": -math.inf, "d": torch.tensor(1.5), "e": np.float32(0.5), "f": 2**70}
    kept = json.loads(json_line(plain(values)))
    assert kept == {"a": 0.1 + 0.2, "b": "NaN", "c": "-Infinity", "d": 1.5, "e": 0.5, "f": 2**70}
    assert plain(math.inf) == "Infinity"
    assert plain([True, None, Path("a/b"), torch.float16, (1, 2)]) == [True, None, "a/b", "torch.float16", [1, 2]]


def test_a_record_says_what_when_and_at_which_step() -> None:
    use = MemoryUse(1, 2, 3, 4)
    record = record_of(MemoryReported(18, (RankMemory(0, use),)), time=1.5, step=17)
    assert record == {
        "event": "memory_reported",
        "time": 1.5,
        "step": 18,
        "ranks": [
            {
                "rank": 0,
                "memory": {
                    "allocated": 1,
                    "max_allocated": 2,
                    "reserved": 3,
                    "max_reserved": 4,
                    "num_allocations": None,
                },
            }
        ],
    }
    assert record_of(Warned("a"), time=1.5, step=17) == {"event": "warned", "time": 1.5, "step": 17, "text": "a"}


@given(st.text())
def test_a_json_line_is_one_line_of_plain_ascii_that_reads_back(text: str) -> None:
    line = json_line({"text": text})
    assert all(32 <= ord(letter) < 127 for letter in line)
    assert json.loads(line) == {"text": text}


def test_a_path_that_was_an_address_gives_no_password_away() -> None:
    assert printable(f"{Path('https://me:secret@host/x')} is read") == "https:/***@host/x is read"
    for text in ("host:/data@2024/x", "C:/a@b", "https://host/a:b@c"):
        assert printable(text) == text

"""What is shown while data is prepared."""

import io
import sys
import time

import pytest

from megalith.data.prepare_progress import Amount, open_progress


class Clock:
    """Time that passes only when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_a_line_is_printed_each_time_enough_is_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with open_progress(100) as progress:
        for documents, seconds in ((50, 2), (120, 2), (150, 2), (210, 0.5), (220, 0.6)):
            clock.now += seconds
            progress.show(Amount(documents, documents * 10, documents * 1000, documents, 1000))
    assert capsys.readouterr().err.splitlines() == [
        "Processed 120 documents (30 documents/s, 300 tokens/s, 0.0 MB/s, 0:00:29 left)",
        "Processed 210 documents (32 documents/s, 323 tokens/s, 0.0 MB/s, 0:00:24 left)",
    ]


def test_the_time_left_is_not_invented_where_the_size_is_unknown() -> None:
    assert Amount(1, 1, 1, 1, None).time_left(5) == ""
    assert Amount(0, 0, 0, 0, 100).time_left(5) == ""
    assert Amount(1, 1, 1, 1, 7201).time_left(1) == "2:00:00 left"


def test_nothing_is_shown_on_request(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with open_progress(1, quiet=True) as progress:
        clock.now += 10
        progress.show(Amount(100))
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    with open_progress(100) as progress:
        progress.show(Amount(1234, 5678, 9_000_000, 50, 100))
    assert "50%" in terminal.getvalue()
    assert "1,234 documents" in terminal.getvalue()

"""The bar on a terminal, seen from the terminal's other end."""

import os
import pty
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megalith.monitor import events
from megalith.monitor.log import RunLog
from megalith.monitor.progress import REFRESH_SECONDS, Pace, fitted
from tests.monitor.reports import STARTED, evaluated, interval_done, step_done
from tests.records import read_records

COLOUR = re.compile(r"\x1b\[[0-9;]*[39][0-9][0-9;]*m")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def terminal() -> Iterator[tuple[int, Callable[[], str]]]:
    """A terminal to write to, and what it was sent, to be asked for once the writer is closed."""
    ours, theirs = pty.openpty()
    received: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # Linux's way to say that the writer is gone
                return
            if not data:
                return
            received.append(data)

    reader = threading.Thread(target=read)
    reader.start()

    def shown() -> str:
        reader.join()
        return b"".join(received).decode()

    try:
        yield theirs, shown
    finally:
        reader.join()
        os.close(ours)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")


def show(run: Callable[[RunLog, Clock], None]) -> str:
    """What a terminal is sent when a run says something."""
    with terminal() as (descriptor, shown):
        clock = Clock()
        with os.fdopen(descriptor, "w") as stream, RunLog("rich", stream, clock=clock) as log:
            run(log, clock)
        return shown()


def short_run(log: RunLog, clock: Clock) -> None:
    log.report(STARTED)
    for step in range(1, 11):
        clock.now += 0.5
        log.report(step_done(step))
    log.report(interval_done(10))
    log.report(evaluated())
    log.report(events.RunEnded(10, "done", 1.0, {}))


def test_the_bar_shows_loss_speed_utilization_and_time_left() -> None:
    text = CONTROL.sub("", show(short_run))
    last = text.replace("\r", "\n").split("step 10/100")[-1].split("\n")[0]
    assert "lm loss 2.5000 | lr 1.00e-02 | 131,072 tokens/s | 156.0 TFLOP/s | MFU 50.0% | left 45 s" in last
    assert "validation at step 10: lm loss 3.0000, perplexity 20.09" in text
    assert "| grad norm" not in text  # the line for where there is no bar
    assert text.rstrip().endswith("done at step 10 after 1:00")


def test_colours_follow_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    assert COLOUR.search(show(short_run)) is not None
    monkeypatch.setenv("NO_COLOR", "1")
    text = show(short_run)
    assert COLOUR.search(text) is None and "lm loss 2.5000" in text


def test_a_terminal_without_a_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    text = show(short_run)
    assert "\x1b" not in text and "step 10/100 | lm loss 2.5000" in text


def test_data_cannot_command_the_terminal() -> None:
    def run(log: RunLog, clock: Clock) -> None:
        log.report(STARTED)
        clock.now += 1.0
        log.report(step_done(1, losses={"lm\x1b]0;owned\x07": 2.5}))
        log.line("a sample: \x1b[31mred[/] [bold]text[/bold]\x9b2J")
        log.report(events.Warned("\x1b[2J"))

    text = show(run)
    assert "\x1b]0;" not in text and "\x1b[31mred" not in text and "\x9b" not in text and "\x1b[2J" not in text
    assert "\\x1b[31mred[/] [bold]text[/bold]\\x9b2J" in text
    assert "lm\\x1b]0;owned\\x07 2.5000" in text


class Counted:
    """A loss that counts how often it is waited for."""

    def __init__(self) -> None:
        self.reads = 0

    def __float__(self) -> float:
        self.reads += 1
        return 2.0


def test_the_bar_waits_for_the_device_only_when_it_is_drawn() -> None:
    loss = Counted()

    def run(log: RunLog, clock: Clock) -> None:
        log.report(STARTED)
        for step in range(1, 51):
            clock.now += REFRESH_SECONDS / 9.5
            log.report(step_done(step, loss))
        assert loss.reads == 5  # at the first step, and then at every tenth

    show(run)


def test_long_lines_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = show(lambda log, clock: log.line("x" * 200))
    assert "x" * 200 in text


def test_a_terminal_that_goes_away_does_not_stop_the_run(tmp_path: Path) -> None:
    """Rich on its own would end the program."""
    ours, theirs = pty.openpty()
    clock = Clock()
    with os.fdopen(theirs, "w") as stream, RunLog("rich", stream, jsonl_path=tmp_path / "log", clock=clock) as log:
        log.report(STARTED)
        os.close(ours)
        for step in range(1, 11):
            clock.now += 0.5
            log.report(step_done(step))
        log.report(evaluated())
    records, _ = read_records(tmp_path / "log")
    assert [record["event"] for record in records].count("step_done") == 10
    assert sum("output is lost" in record.get("text", "") for record in records) == 1


def test_a_run_that_fails_leaves_the_cursor_shown() -> None:
    def run(log: RunLog, clock: Clock) -> None:
        log.report(STARTED)
        clock.now += 1.0
        log.report(step_done(1))

    text = show(run)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_the_pace_follows_the_last_steps_and_is_right_from_the_first() -> None:
    pace = Pace()
    pace.add(step_done(1))
    assert (pace.seconds, pace.tokens, pace.flops) == (0.5, 65536.0, 78e12)
    for step in range(2, 200):
        pace.add(events.StepDone(step, 0, 100, 4.0, {}, 0.0, 1, 1.0, skipped=False))
    assert pace.seconds == pytest.approx(4.0) and pace.tokens == pytest.approx(100.0, rel=1e-3)


@pytest.mark.parametrize(
    ("columns", "beside"),
    [
        ("120", "lm loss 2.5000 | lr 1.00e-02 | 131,072 tokens/s | 156.0 TFLOP/s | MFU 50.0% | left 45 s"),
        ("100", "lm loss 2.5000 | 131,072 tokens/s | 156.0 TFLOP/s | MFU 50.0% | left 45 s"),
        ("80", "lm loss 2.5000 | 131,072 tokens/s | MFU 50.0% | left 45 s"),
        ("60", "lm loss 2.5000 | left 45 s"),
        ("40", "left 45 s"),
    ],
)
def test_a_narrow_terminal_keeps_the_step_the_loss_and_the_time_left(
    columns: str, beside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = CONTROL.sub("", show(short_run)).replace("\r", "\n")
    (last, *_) = [line.rstrip() for line in text.split("\n") if line.startswith("step 10/100")]
    assert last.endswith(f" {beside}") and len(last) <= int(columns)


def test_what_weighs_least_goes_first_and_something_always_stays() -> None:
    figures = [(3, "loss 1"), (1, "lr 2"), (2, "speed 3")]
    assert fitted(figures, 100) == "loss 1 | lr 2 | speed 3"
    assert fitted(figures, 22) == "loss 1 | speed 3"
    assert fitted(figures, 10) == "loss 1"
    assert fitted(figures, 1) == "loss 1"

"""One report reaches the stream in its form, log.jsonl whole and TensorBoard; no failure of theirs reaches the run."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megalith.monitor import events
from megalith.monitor.log import MOST_WAITING, RunLog, choose_format
from megalith.monitor.scalars import Scalars
from megalith.monitor.settings import MonitorConfig
from tests.monitor.reports import STARTED, evaluated, interval_done, step_done
from tests.records import read_records


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ticking() -> Callable[[], float]:
    """A clock that goes on by a second whenever it is read."""
    now = [1000.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    return clock


def short_run(log: RunLog) -> None:
    log.line("building GPT model ...", detail=True)
    log.report(STARTED)
    for step in range(1, 4):
        log.report(step_done(step))
    log.report(interval_done(3))
    log.report(evaluated())
    log.report(events.RunEnded(3, "done", 2.0, {"step": 100.0, "data": 20.0}))


def test_the_form_is_the_one_asked_for_or_fits_the_stream() -> None:
    assert choose_format("auto", io.StringIO()) == "reference"
    assert choose_format("auto", Terminal()) == "rich"
    assert choose_format("json", Terminal()) == "json"
    with pytest.raises(ValueError, match="log_format = 'xml' is unknown: use auto, reference, rich, json"):
        choose_format("xml", io.StringIO())
    with pytest.raises(ValueError, match="log_format = 'auto' is unknown"):
        RunLog("auto", io.StringIO())


def test_the_reference_form_is_megatrons() -> None:
    stream = io.StringIO()
    with RunLog("reference", stream) as log:
        short_run(log)
    said = stream.getvalue().splitlines()
    assert said[:2] == ["building GPT model ...", "training ..."]
    assert said[2].startswith(" iteration        3/     100 |")
    assert said[4].startswith(" validation loss at iteration 10 | ")
    assert len(said) == 6


def test_the_form_for_people_is_short_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with RunLog("rich", stream) as log:
        short_run(log)
    assert stream.getvalue().splitlines() == [
        "training: step 0 to 100 on 1 device",
        "step 3/100 | lm loss 2.5000 | learning rate 0.003 | grad norm 1.25 | 131,072 tokens/s | 156.0 TFLOP/s "
        "| MFU 50.0% | 2 steps skipped | left 1:37",
        "validation at step 10: lm loss 3.0000, perplexity 20.09 (1.5 s)",
        "done at step 3 after 2:00",
    ]


def test_the_json_form_is_the_records_of_the_file(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog("json", stream, jsonl_path=tmp_path / "log.jsonl", clock=ticking()) as log:
        short_run(log)
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    records, damaged = read_records(tmp_path / "log.jsonl")
    assert said == records and damaged == 0
    assert [record["event"] for record in records] == [
        "line",
        "training_started",
        *["step_done"] * 3,
        "interval_done",
        "evaluated",
        "run_ended",
    ]


def test_the_file_keeps_every_value_with_its_time_and_step(tmp_path: Path) -> None:
    with RunLog("reference", io.StringIO(), jsonl_path=tmp_path / "log.jsonl", clock=ticking()) as log:
        log.report(step_done(1, 0.1 + 0.2))
        log.report(step_done(2))
        log.report(events.Warned("careful"))
    first, second, warned = read_records(tmp_path / "log.jsonl")[0]
    assert first["losses"] == {"lm loss": 0.1 + 0.2} and first["loss_scale"] == 65536.0 and first["skipped"] is False
    assert [record["time"] for record in (first, second, warned)] == [1001.0, 1002.0, 1003.0]
    assert [record["step"] for record in (first, second, warned)] == [1, 2, 2]


class Unread:
    """A loss on a device that must not be waited for yet."""

    def __init__(self) -> None:
        self.ready = False

    def __float__(self) -> float:
        assert self.ready, "read too early"
        return 2.0


def test_the_values_of_steps_are_read_when_something_else_is_said(tmp_path: Path) -> None:
    losses = [Unread() for _ in range(3)]
    scalars = Scalars(tmp_path, MonitorConfig())
    with RunLog("reference", io.StringIO(), jsonl_path=tmp_path / "log.jsonl", scalars=scalars) as log:
        for step, loss in enumerate(losses, start=1):
            log.report(step_done(step, loss))
        assert not (tmp_path / "log.jsonl").exists()
        for loss in losses:
            loss.ready = True
        log.line("now")
        assert len(read_records(tmp_path / "log.jsonl")[0]) == 4


def test_steps_do_not_wait_for_ever(tmp_path: Path) -> None:
    log = RunLog("reference", io.StringIO(), jsonl_path=tmp_path / "log.jsonl")
    for step in range(1, MOST_WAITING + 2):
        log.report(step_done(step))
    assert len(read_records(tmp_path / "log.jsonl")[0]) == MOST_WAITING
    log.close()
    assert len(read_records(tmp_path / "log.jsonl")[0]) == MOST_WAITING + 1


def test_other_ranks_say_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog("json", stream, jsonl_path=tmp_path / "log.jsonl", is_printing_rank=False) as log:
        short_run(log)
    assert stream.getvalue() == "" and not (tmp_path / "log.jsonl").exists()


def test_a_text_of_several_lines_is_several_lines_and_escapes_are_shown() -> None:
    stream = io.StringIO()
    with RunLog("reference", stream) as log:
        log.line("a sample:\nfirst \x1b[2J\nsecond")
    assert stream.getvalue() == "a sample:\nfirst \\x1b[2J\nsecond\n"


@pytest.mark.parametrize("form", ["reference", "rich", "json"])
def test_a_reader_that_goes_away_is_noted_in_the_file_and_the_run_goes_on(form: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with (
        os.fdopen(writing, "w") as stream,
        RunLog(form, stream, jsonl_path=tmp_path / "log.jsonl") as log,
    ):
        short_run(log)
        short_run(log)
    records, damaged = read_records(tmp_path / "log.jsonl")
    warned = [record["text"] for record in records if record["event"] == "warned"]
    assert len(warned) == 1 and "output is lost, training goes on" in warned[0] and damaged == 0
    assert sum(record["event"] == "evaluated" for record in records) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
@pytest.mark.parametrize("form", ["reference", "rich", "json"])
def test_a_full_disk_is_said_once_on_the_stream_and_the_run_goes_on(form: str) -> None:
    stream = io.StringIO()
    with RunLog(form, stream, jsonl_path=Path("/dev/full")) as log:
        short_run(log)
        short_run(log)
    assert stream.getvalue().count("/dev/full is not written, training goes on: ") == 1
    assert stream.getvalue().count("TFLOP/s" if form == "rich" else "3.0") >= 2


PROGRAM = """
import sys
from pathlib import Path
from megalith.monitor import events
from megalith.monitor.log import RunLog
with RunLog("reference", sys.stdout) as log:
    for number in range(20000):
        log.line(f"line {number}")
print("trained to the end", file=sys.stderr)
"""


def test_a_program_whose_reader_leaves_ends_well() -> None:
    """As under `megalith pretrain | head`: also when Python, on its way out, flushes what nobody will read."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert program.stdout is not None and program.stderr is not None
    assert program.stdout.readline() == "line 0\n"
    program.stdout.close()
    said = program.stderr.read()
    program.stderr.close()
    assert program.wait() == 0
    first, last = said.splitlines()
    assert first == "warning: the run's output is lost, training goes on: [Errno 32] Broken pipe"
    assert last == "trained to the end"


def test_starting_to_log_does_not_import_torch_or_the_terminal_library() -> None:
    """A first line must not wait for what it does not need."""
    program = (
        "import sys, megalith.monitor.log, megalith.monitor.interval, megalith.monitor.ledger; "
        "print([m for m in ('torch', 'numpy', 'rich', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == "[]\n"

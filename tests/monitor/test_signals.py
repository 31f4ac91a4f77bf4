"""The first signal is noted, the second ends the process."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megalith.launch import SECONDS_OF_ONE_REQUEST, STOPPING
from megalith.monitor.signals import StopSignals, ending_at_once


@pytest.mark.parametrize("number", STOPPING)
def test_first_signal_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received is number
    assert signal.getsignal(number) is before


def test_a_terminal_that_goes_away_asks_nothing_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_a_thread_of_another_program_signals_stay_with_it() -> None:
    before = {number: signal.getsignal(number) for number in STOPPING}

    def enter() -> dict[signal.Signals, object]:
        with ending_at_once(75, speaks=False), StopSignals() as signals:
            assert signals.received is None
            return {number: signal.getsignal(number) for number in STOPPING}

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() == before


def test_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "from megalith.monitor.signals import StopSignals\n"
        "def clock():\n"
        "    with open(sys.argv[1]) as file: now = float(file.read())\n"
        "    os.write(1, b'asked\\n')\n"
        "    return now\n"
        "with StopSignals(clock=clock) as signals:\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.01)\n"
    )
    now = tmp_path / "now"
    now.write_text("0")
    child = subprocess.Popen([sys.executable, "-c", program, str(now)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == b"asked\n"
    now.write_text("0.3")
    # A launcher hands on what the scheduler has sent to all processes: that is the same request.
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == b"asked\n"
    assert child.poll() is None
    now.write_text(str(SECONDS_OF_ONE_REQUEST + 0.1))
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=10) == 128 + signal.SIGTERM
    child.stdout.close()


def test_what_follows_within_a_second_is_the_same_request() -> None:
    now = [100.0]
    with StopSignals(clock=lambda: now[0]) as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        now[0] += SECONDS_OF_ONE_REQUEST
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received is signal.SIGUSR1

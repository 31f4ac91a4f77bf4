"""--profile writes a trace, a memory snapshot and what costs most."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalith.config import ConfigError
from megalith.monitor.profile import COSTLIEST, Cost, Profile, costs_of, summary
from tests.layouts.runs import events_of, run_on, write_data


def test_the_steps_asked_for_are_traced_and_no_others(tmp_path: Path) -> None:
    told: list[str] = []
    profile = Profile(tmp_path / "profile", torch.device("cpu"), first=2, last=3, tell=told.append)
    square = torch.ones(300, 300)
    for step in range(1, 6):
        profile.before_step(step)
        square @ square
        if step > 3:
            torch.linalg.inv(torch.eye(3))
        profile.after_step(step)
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("aten::mm") == 2 and "aten::linalg_inv" not in names
    assert "aten::mm" in (tmp_path / "profile" / "summary.txt").read_text().splitlines()[1]
    assert json.loads((tmp_path / "profile" / "memory.json").read_text())["bytes_taken"]["aten::mm"] == 2 * 4 * 300**2
    assert "aten::mm" in told[1] and str(tmp_path) in told[-1]


def test_the_summary_is_one_screen_and_its_shares_add_up() -> None:
    costs = [Cost(f"operation {n}", float(20 - n), 4, 0) for n in range(20)]
    lines = summary(costs, steps=[5, 6]).splitlines()
    assert len(lines) == COSTLIEST + 2
    assert sum(float(line.split("%")[0]) for line in lines[1:]) == pytest.approx(100, abs=1)
    assert lines[1].split() == ["9.5", "%", "10.0000", "s", "2", "calls", "operation", "0"]


def test_a_kernel_of_a_device_counts_once() -> None:
    def event(name: str, device: str, *, is_user_annotation: bool = False) -> Any:
        return SimpleNamespace(
            key=name,
            device_type=SimpleNamespace(name=device),
            is_user_annotation=is_user_annotation,
            self_device_time_total=3e6,
            self_device_memory_usage=0,
            count=2,
        )

    # As torch tells them: what starts a kernel has its time too, and so has what the compiler marks around several.
    averages = [
        event("aten::mm", "CPU"),
        event("gemm", "CUDA"),
        event("## Call CompiledFxGraph ##", "CUDA", is_user_annotation=True),
    ]
    assert costs_of(averages, on_device=True) == [Cost("gemm", 3.0, 2, 0)]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_memory_of_a_device_is_what_the_viewer_of_torch_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own functions where they need no device; what a device would have taken is empty."""
    history: list[dict[str, Any]] = []
    empty: dict[str, Any] = {"segments": [], "device_traces": [[]]}
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **given: history.append(given))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda *args, **kwargs: empty)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    told: list[str] = []
    profile = Profile(tmp_path / "profile", torch.device("cuda"), first=1, last=1, tell=told.append)
    profile.before_step(1)
    profile.after_step(1)
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"trace.json", "memory.pickle", "summary.txt"}
    assert (tmp_path / "profile" / "memory.pickle").read_bytes() == pickle.dumps(empty)
    assert history == [{"stacks": "python", "max_entries": 100_000}, {"enabled": None}]
    assert any("memory.pickle" in line for line in told)


def test_a_run_is_profiled_into_its_directory(tmp_path: Path) -> None:
    words = ["--train-iters", "4", "--profile", "--profile-step-start", "2", "--profile-step-end", "3"]
    assert run_on(1, words, tmp_path / "run", write_data(tmp_path)) == 0
    assert {path.name for path in (tmp_path / "run" / "profile").iterdir()} == {
        "trace.json",
        "memory.json",
        "summary.txt",
    }


def said_in(save: Path) -> str:
    """The lines of a run's log that are no events of their own."""
    return "\n".join(record["text"] for record in events_of(save, "line"))


def test_the_summary_is_said_with_several_ranks(tmp_path: Path) -> None:
    words = ["--train-iters", "3", "--profile", "--profile-step-start", "2", "--profile-step-end", "3"]
    assert run_on(2, words, tmp_path / "run", write_data(tmp_path)) == 0
    assert "costliest of steps 2 to 3" in said_in(tmp_path / "run")


def test_a_run_that_ends_among_the_steps_to_trace_keeps_those_it_took_and_one_that_goes_on_among_them(
    tmp_path: Path,
) -> None:
    words = ["--num-layers", "1", "--train-iters", "5", "--profile", "--profile-step-start", "2"]
    words += ["--profile-step-end", "4"]
    run, data = tmp_path / "run", write_data(tmp_path)
    assert run_on(1, [*words, "--exit-interval", "2"], run, data) == 0
    assert "costliest of steps 2 to 2" in said_in(run)
    assert run_on(1, words, run, data) == 0
    assert "costliest of steps 3 to 4" in said_in(run)
    text = (run / "profile" / "summary.txt").read_text()
    assert "costliest of steps 3 to 4" in text and json.loads((run / "profile" / "trace.json").read_text())
    assert "nothing was traced" not in said_in(run)


def test_a_run_that_took_none_of_the_steps_to_trace_says_so(tmp_path: Path) -> None:
    words = ["--train-iters", "6", "--profile", "--profile-step-start", "5", "--profile-step-end", "6"]
    assert run_on(1, [*words, "--exit-interval", "2"], tmp_path / "run", write_data(tmp_path)) == 0
    assert "nothing was traced, for no step from 5 to 6 was taken" in said_in(tmp_path / "run")


def test_a_trace_that_cannot_be_written_costs_no_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["--train-iters", "3", "--profile", "--profile-step-start", "2", "--profile-step-end", "2"]
    words += ["--profile-dir", str(tmp_path / "file" / "profile")]
    assert run_on(1, words, tmp_path / "run", write_data(tmp_path)) == 0
    assert "Not a directory: what was traced is lost" in said_in(tmp_path / "run")
    assert len(events_of(tmp_path / "run", "step_done")) == 3


def test_steps_that_never_come_are_refused(tmp_path: Path) -> None:
    words = ["--train-iters", "4", "--profile", "--profile-step-start", "9", "--profile-step-end", "8"]
    with pytest.raises(BaseException) as caught:
        run_on(1, words, tmp_path / "run", write_data(tmp_path))
    assert "--profile-step-start = 9: is after the last step, 4" in str(caught.value)
    assert "--profile-step-end = 8: is before" in str(caught.value)
    assert ConfigError.__name__ in str(caught.value)

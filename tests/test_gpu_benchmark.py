"""The program that measures a GPU runs from end to end where there is none, so that a GPU's time is spent measuring."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_memory import peak_of
from benchmarks.gpu_profile import busy_seconds, idle_before, kind_of

ROOT = Path(__file__).parent.parent


def test_what_overlaps_is_busy_once() -> None:
    assert busy_seconds([(3.0, 4.0), (0.0, 1.0), (0.5, 2.0), (0.6, 0.7)]) == pytest.approx(3.0)


def test_idle_time_is_told_by_what_ended_it() -> None:
    kernels = [(7.0, 8.0, "b"), (0.0, 1.0, "a"), (1.5, 3.0, "b"), (1.6, 4.0, "c"), (4.0, 5.0, "b"), (5.25, 6.0, "a")]
    assert list(idle_before(kernels).items()) == [("b", 1.5), ("a", 0.25)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_192x192_64x4", "products"),
        ("triton_poi_fused_gelu_8", "compiled"),
        ("triton_per_fused_native_layer_norm_backward_0", "compiled"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>", "attention"),
        ("attend_backward_keys", "attention"),
        ("_gelu_backward", "own"),
        ("_norm_backward", "own"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "other"),
    ],
)
def test_kernels_have_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_the_peak_of_memory_is_told_by_the_places_that_hold_it() -> None:
    def event(action: str, address: int, size: int, *frames: tuple[str, int, str]) -> dict[str, object]:
        keys = ("filename", "line", "name")
        return {
            "action": action,
            "addr": address,
            "size": size,
            "frames": [dict(zip(keys, f, strict=True)) for f in frames],
        }

    library = ("/site/torch/nn/functional.py", 5, "linear")
    loss = ("/src/megalith/layers/loss.py", 90, "forward")
    peak = peak_of(
        [
            event("free_requested", 1, 100),  # it was there before
            event("alloc", 1, 300, library, loss),
            event("alloc", 2, 50, library),
            event("alloc", 3, 20, loss),
            event("free_requested", 1, 300),
            event("free_completed", 1, 300),
            event("alloc", 1, 250, loss),
        ]
    )
    assert peak.bytes_held == 300 + 50 + 20 - 100
    assert peak.places == {"loss.py:90 forward": 320, "functional.py:5 linear": 50}


def test_what_a_process_said_that_failed_is_kept(tmp_path: Path) -> None:
    report = gpu.Report(False, time.monotonic() + 100, 1, tmp_path / "new" / "gpu")
    programs = {
        "broke": "print('half of it'); import sys; sys.exit('why')",
        "hung": "print('begun', flush=True); import time; time.sleep(60)",
        "said no figures": "print('nothing')",
    }
    for name, program in programs.items():
        assert report.figures_of(name, [sys.executable, "-c", program], seconds=60 if name != "hung" else 2) is None
    report.deadline = time.monotonic() + 1
    assert report.run("late", [sys.executable, "-c", ""], seconds=60) is None
    assert report.faults == [
        "broke: status 1\nhalf of it\nwhy",
        "hung: took more than its 2 s\nbegun",
        "said no figures: its last line is no JSON\nnothing",
        "late: no time was left",
    ]
    kept = (tmp_path / "new" / "gpu.txt").read_text()
    assert all(word in kept for word in ("half of it", "why", "begun", "nothing"))


def measured_by(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The status of gpu.py whose models break, and whose text tells the device."""

    def conditions(report: gpu.Report) -> None:
        report.figures["conditions"] = {"device": "NVIDIA H200"}

    def models(report: gpu.Report) -> None:
        report.say("a row")
        raise RuntimeError("broken")

    def text(report: gpu.Report) -> None:
        report.figures["text"] = report.figures["conditions"]["device"]

    monkeypatch.setattr(gpu, "conditions", conditions)
    monkeypatch.setattr(gpu, "SECTIONS", (conditions, models, text))
    monkeypatch.setattr(sys, "argv", ["gpu.sh", *words])
    return gpu.main()


def test_a_section_that_breaks_costs_no_other_and_no_report_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    # The device is known whichever sections are asked for: what is planned depends on it.
    assert measured_by(monkeypatch, "--only", "models", "text") == 1
    assert measured_by(monkeypatch, "--only", "text") == measured_by(monkeypatch, "--only", "text") == 0
    reports = {path.name.split("-", 4)[4]: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert reports.keys() == {"models-text.json", "text.json", "text-2.json"}
    assert all(report["text"] == "NVIDIA H200" for report in reports.values())
    assert reports["models-text.json"]["faults"] == ["models: RuntimeError: broken"]
    assert "a row" in next(tmp_path.glob("*-models-text.txt")).read_text()


def test_a_model_whose_loss_is_another_than_before_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def figures_of(self: gpu.Report, name: str, command: Sequence[str], **limits: float) -> Any:
        if "plan" in command:
            return None
        losses = {gpu.ROWS[0].name: gpu.ROWS[0].loss + 1e-4, gpu.ROWS[1].name: 11.2, gpu.ROWS[2].name: float("nan")}
        numbers = dict.fromkeys(
            ("step_seconds", "tokens_per_second", "mfu", "mfu_datasheet", "first_step_seconds"), 1.0
        )
        return [], {**numbers, "peak_memory_bytes": 1, "last_loss": losses[name]}

    monkeypatch.setattr(gpu.Report, "figures_of", figures_of)
    report = gpu.Report(False, time.monotonic() + 100, 3, tmp_path / "gpu")
    report.figures["conditions"] = {"device": "NVIDIA H100"}
    gpu.models(report)
    assert [fault.split(": its last loss is ") for fault in report.faults] == [
        [gpu.ROWS[1].name, f"11.2000 and was {gpu.ROWS[1].loss}"],
        [gpu.ROWS[2].name, f"nan and was {gpu.ROWS[2].loss}"],
    ]


def test_each_goal_is_measured_by_one_of_the_rows_that_end_in_five_minutes() -> None:
    of_all, of_seven = ({(row.seconds, row.gib) for row in rows} for rows in (gpu.ROWS, gpu.ROWS[:7]))
    assert of_seven == of_all - {(None, None)} and len(of_seven) == 7
    profiled = [gpu.ROWS[number] for number, _ in gpu.PROFILES]
    assert [(row.seconds, row.gib) for row in profiled] == [(1.30, None), (None, 46), (1.12, None), (1.50, None)]


def test_what_cannot_be_written_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OUT", str(tmp_path / "file" / "out"))
    assert measured_by(monkeypatch, "--only", "text") == 1
    printed = capsys.readouterr().out
    assert printed.count("FAULT files: ") == 1 and printed.endswith("1 faults\n")


@pytest.mark.slow
def test_the_rehearsal_measures_everything_and_finds_no_fault(tmp_path: Path) -> None:
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--rehearse", "--minutes", "15"]
    environment = {**os.environ, "OUT": str(tmp_path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1000)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-2000:]
    (report,) = tmp_path.glob("*.json")
    figures = json.loads(report.read_text())
    assert figures["faults"] == []
    assert len(figures["models"]) == 10
    assert all(
        found["tokens_per_second"] > 0 and found["peak_memory_bytes"] > 0 for found in figures["models"].values()
    )
    assert figures["equality"]["largest_relative_difference"] == 0.0  # both sides are the CPU here
    assert abs(figures["text"]["fp8_loss_gap"]) < 0.02
    assert len(figures["products"]) > 10


def test_without_a_gpu_it_says_so() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ended = subprocess.run([str(ROOT / "benchmarks" / "gpu.sh")], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert ended.stderr.startswith("gpu.sh: no CUDA device here. --rehearse")

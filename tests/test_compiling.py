"""`--compile auto` decides by the length of the run and the device, alike in every restart, and says so."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megalith.compiling import COMPILING, SAVED_ON_GPU, USUAL_UTILIZATION, decide
from megalith.layers.initial import draw_weights
from megalith.layers.random import dropout_rows
from megalith.models.decoder import Decoder
from megalith.models.settings import ModelConfig
from megalith.parallel.recompute import cache_folder, compile_blocks
from megalith.sources import read_command_line

PEAK = 1e15


def decided(words: str, *, device: str = "cuda", seconds: float = 1e6) -> tuple[bool, str | None]:
    """For a run whose steps take so many seconds in all on the device."""
    flops = seconds / 100 * PEAK * USUAL_UTILIZATION
    run = read_command_line(words.split())
    return decide(run, device_type=device, peak_flops=PEAK, step_flops=flops, num_steps=100)


def test_nothing_is_compiled_or_said_unless_asked() -> None:
    assert decided("") == (False, None)


def test_what_is_asked_is_done_on_any_device_and_for_any_length() -> None:
    assert decided("--compile on", device="cpu", seconds=1) == (True, None)


def test_auto_compiles_where_twice_its_cost_is_saved_on_a_gpu() -> None:
    even = 2 * COMPILING / SAVED_ON_GPU
    for seconds, compiles in ((0.99 * even, False), (1.01 * even, True)):
        found, why = decided("--compile auto", seconds=seconds)
        assert found == compiles
        assert why is not None and f"about {seconds / 60:,.0f} minutes of steps" in why


def test_auto_leaves_a_cpu_and_a_split_backward_pass_alone() -> None:
    assert decided("--compile auto", device="cpu") == (
        False,
        "blocks are not compiled (--compile auto): on a CPU it saves less than it costs.",
    )
    compiles, why = decided("--compile auto --pipeline-schedule zero-bubble")
    assert not compiles and why is not None and "zero-bubble" in why


def test_compiled_code_is_kept_with_the_users_other_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder({"XDG_CACHE_HOME": "/somewhere"}) == Path("/somewhere/megalith")
    assert cache_folder({}) == Path.home() / ".cache/megalith"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "so that it is put back as it was")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compile_blocks(nn.Linear(1, 1), memory_budget=None, device=torch.device("cpu"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere/megalith/compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    compile_blocks(nn.Linear(1, 1), memory_budget=None, device=torch.device("cpu"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


@pytest.mark.parametrize(("asked", "inside", "budget"), [(None, False, 1.0), (0.3, False, 0.3), (0.3, True, 0.0)])
def test_what_is_computed_again_inside_keeps_nothing(asked: float | None, inside: bool, budget: float) -> None:
    import torch._functorch.config as partitioning

    compile_blocks(nn.Linear(1, 1), memory_budget=asked, device=torch.device("cpu"), recompute_inside=inside)
    assert partitioning.activation_memory_budget == budget
    compile_blocks(nn.Linear(1, 1), memory_budget=None, device=torch.device("cpu"))
    assert partitioning.activation_memory_budget == 1.0


def test_rows_that_fit_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    sympy = pytest.importorskip("sympy")  # which torch brings
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.sizevars import SizeVarAllocator
    from torch._inductor.virtualized import V

    from megalith.parallel.kernel_choices import KernelChoices

    monkeypatch.setattr(InductorChoices, "should_use_persistent_reduction", lambda features, cooperative: "its own")
    choices = KernelChoices()
    for width, hint, cooperative, expected in (
        (sympy.Integer(1600), ReductionHint.INNER, False, True),
        (sympy.Integer(4096), ReductionHint.INNER, False, True),
        (sympy.Integer(4097), ReductionHint.INNER, False, "its own"),
        (sympy.Symbol("rows", positive=True, integer=True), ReductionHint.INNER, False, "its own"),
        (sympy.Integer(1600), ReductionHint.OUTER, False, "its own"),
        (sympy.Integer(1600), ReductionHint.INNER, True, "its own"),
    ):
        features = SimpleNamespace(get_reduction_hint=lambda hint=hint: hint, reduction_numel=width)
        graph: Any = SimpleNamespace(sizevars=SizeVarAllocator())
        with V.set_graph_handler(graph):
            assert choices.should_use_persistent_reduction(features, cooperative) == expected


@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_all_layers_share_what_is_compiled(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that differs between layers would have each compiled anew, and none from the ninth on: torch's limit."""
    config = ModelConfig(
        num_layers=10,
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=8,
        hidden_dropout=dropout,
        attention_dropout=0.0,
    )
    model = Decoder(config, 64)
    draw_weights(model, 7)
    tokens, places = torch.arange(16).view(2, 8), torch.arange(8).expand(2, 8)
    rows = dropout_rows(1, torch.arange(2), 8)
    plain = model(tokens, places, rows=rows)
    graphs = []
    torch._dynamo.reset()  # other tests of this process have compiled such blocks, perhaps as often as torch allows

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend=count))
    compile_blocks(model, memory_budget=None, device=torch.device("cpu"))
    torch.testing.assert_close(model(tokens, places, rows=rows), plain)
    assert len(graphs) == 1

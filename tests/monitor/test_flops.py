"""The operations of training by published formulas, and the speed that follows."""

import pytest

from megalith.monitor.flops import (
    datasheet_flops,
    throughput,
    training_flops,
)


def reference_flops(*, vocab_size: int = 50304, recompute: str | None = None, causal: bool = False) -> float:
    """One step of the run in Megatron-LM's log."""
    return training_flops(
        num_layers=48,
        hidden_size=1600,
        seq_length=1024,
        vocab_size=vocab_size,
        batch=64,
        recompute=recompute,
        causal=causal,
    )


def test_the_reference_run_takes_what_megatrons_formula_says() -> None:
    B, s, layers, h, V = 64, 1024, 48, 1600, 50304
    formula = 96 * B * s * layers * h**2 * (1 + s / (6 * h) + V / (16 * layers * h))
    assert reference_flops(recompute="full") == pytest.approx(formula, rel=1e-14)
    assert reference_flops(recompute="full") == pytest.approx(8.87206e14, rel=1e-6)
    assert reference_flops() == pytest.approx(6.73317e14, rel=1e-6)
    assert reference_flops(vocab_size=50257, recompute="full") == pytest.approx(8.87176e14, rel=1e-6)


def test_the_causal_convention_gives_less() -> None:
    assert reference_flops(causal=True) == pytest.approx(642.4e12, rel=1e-4)


def test_selective_recomputation_repeats_attention_alone() -> None:
    B, s, layers, h = 64, 1024, 48, 1600
    again = reference_flops(recompute="selective") - reference_flops()
    assert again == pytest.approx(4 * B * s * s * h * layers)


def test_an_unknown_recomputation_is_refused() -> None:
    with pytest.raises(ValueError, match="recompute = 'some' is unknown: use full, selective or None"):
        reference_flops(recompute="some")


def test_shared_keys_and_gates_are_counted_as_their_matrices() -> None:
    """Against the weights of a Llama 3 8B, of which each takes two operations per token forward and four backward."""
    width, inner, keys, layers, vocabulary, length = 4096, 14336, 1024, 32, 128256, 8192
    weights = layers * (width * (width + 2 * keys) + width * width + 3 * width * inner) + width * vocabulary
    attention = layers * 12 * length * width
    counted = training_flops(
        num_layers=layers,
        hidden_size=width,
        seq_length=length,
        vocab_size=vocabulary,
        batch=3,
        ffn_hidden_size=inner,
        key_value_width=keys,
        gated=True,
    )
    assert counted == pytest.approx(3 * length * (6 * weights + attention), rel=1e-14)


@pytest.mark.parametrize(
    ("seconds", "tokens", "hardware", "model", "share"),
    [(7.4113, 8842.7, 119.71, 90.85, 0.384), (7.4520, 8794.4, 119.06, 90.35, 0.382)],
)
def test_the_reference_runs_speed(seconds: float, tokens: float, hardware: float, model: float, share: float) -> None:
    with_repeats = reference_flops(recompute="full")
    peak = datasheet_flops("NVIDIA A100-SXM4-40GB", "float16")
    speed = throughput(65536, seconds, model_flops=with_repeats, num_devices=1, peak_flops=peak)
    assert speed.tokens_per_second == pytest.approx(tokens, abs=0.05)
    assert speed.tflops_per_device == pytest.approx(hardware, abs=0.005)
    assert speed.mfu == pytest.approx(share, abs=0.0005)
    speed = throughput(65536, seconds, model_flops=reference_flops(), num_devices=1, peak_flops=None)
    assert speed.tflops_per_device == pytest.approx(model, abs=0.005)
    assert speed.mfu is None


def test_no_time_or_no_count_gives_no_speed_and_no_fault() -> None:
    nothing = throughput(10, 0.0, model_flops=1.0, num_devices=1, peak_flops=1.0)
    assert (nothing.tokens_per_second, nothing.tflops_per_device, nothing.mfu) == (0.0, None, None)
    assert throughput(10, 2.0, model_flops=None, num_devices=1, peak_flops=1.0).tokens_per_second == 5.0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.0),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Some Future Device", None),
    ],
)
def test_the_peak_of_a_device_is_its_data_sheets_or_unknown(name: str, tflops: float | None) -> None:
    assert datasheet_flops(name, "bfloat16") == (None if tflops is None else tflops * 1e12)


def test_a_device_without_bfloat16_units_has_a_peak_for_float16_only() -> None:
    assert datasheet_flops("Tesla V100-SXM2-32GB", "float16") == 125e12
    assert datasheet_flops("Tesla V100-SXM2-32GB", "bfloat16") is None
    assert datasheet_flops("NVIDIA A100-SXM4-80GB", "float32") is None

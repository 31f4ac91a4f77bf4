"""How many floating-point operations training takes, and how near that comes to what the device can do.

A multiplication and an addition count as two. A figure means something only with its convention, of which there are
two here:
- Megatron's (Narayanan et al. 2021, arXiv:2104.04473): matrix products of all layers and of the output, with every
  token attending to every other. `training_flops(...)`.
- causal: the same with attention at half, since half the scores are masked. `training_flops(..., causal=True)`.
Model FLOPs, from which MFU is reckoned, leave out what is computed twice to save memory.
"""

import re
from dataclasses import dataclass

TERA = 1e12


def training_flops(
    *,
    num_layers: int,
    hidden_size: int,
    seq_length: int,
    vocab_size: int,
    batch: int,
    recompute: str | None = None,
    causal: bool = False,
    ffn_hidden_size: int | None = None,
    attention_width: int | None = None,
    key_value_width: int | None = None,
    gated: bool = False,
) -> float:
    """Operations of one step over batch sequences: forward, and a backward of twice that.

    recompute adds what the backward pass computes again: "full" the forward of every layer, "selective" that of
    attention alone (scores and their product with the values); None gives the model's own operations. ffn_hidden_size:
    4 hidden_size unless given. attention_width: heads x width of a head, hidden_size unless given; key_value_width:
    that of the keys, attention_width unless heads share keys. gated: the feed-forward has three matrices instead of
    two.

    With the defaults this is 72 B s l h^2 (1 + s/(6h) + V/(12 l h)), and 96 B s l h^2 (1 + s/(6h) + V/(16 l h)) with
    full recomputation. Raises ValueError for an unknown recompute.
    """
    if recompute not in (None, "full", "selective"):
        raise ValueError(f"recompute = {recompute!r} is unknown: use full, selective or None")
    queries = attention_width or hidden_size
    keys = key_value_width or queries
    inner = ffn_hidden_size or 4 * hidden_size
    # Forward operations of one token in one layer.
    projections = 2 * hidden_size * (queries + 2 * keys) + 2 * queries * hidden_size
    feed_forward = 2 * (3 if gated else 2) * hidden_size * inner
    attention = (2 if causal else 4) * seq_length * queries
    layer = projections + feed_forward + attention
    again = {None: 0, "full": layer, "selective": attention}[recompute]
    output = 2 * hidden_size * vocab_size
    return float(batch * seq_length * (num_layers * (3 * layer + again) + 3 * output))


@dataclass(frozen=True)
class Throughput:
    tokens_per_second: float  # over all devices
    tflops_per_device: float | None  # of the model; None if its operations are not counted
    mfu: float | None  # model FLOPs utilization, the share of the device's peak; None if either is unknown


def throughput(
    num_tokens: float, seconds: float, *, model_flops: float | None, num_devices: int, peak_flops: float | None
) -> Throughput:
    """The speed at which num_tokens and their model_flops were done in seconds; peak_flops per second and device."""
    if seconds <= 0.0:
        return Throughput(0.0, None, None)
    if model_flops is None:
        return Throughput(num_tokens / seconds, None, None)
    per_device = model_flops / seconds / num_devices
    return Throughput(num_tokens / seconds, per_device / TERA, None if peak_flops is None else per_device / peak_flops)


# What the maker's data sheet says of dense 16-bit matrix products summed in 32 bits, in TFLOP/s. A device's name is
# held against the patterns in this order; one that fits none, or a part of a device (MIG), has no known peak.
DATASHEET_TFLOPS = (
    (r"\bGB200\b", 2500.0),
    (r"\bB200\b", 2250.0),
    (r"\bH200 NVL\b", 835.5),
    (r"\bH200\b", 989.4),
    (r"\bGH200\b", 989.4),
    (r"\bH100 PCIe\b", 756.0),
    (r"\bH100 NVL\b", 835.5),
    (r"\bH100\b", 989.4),
    (r"\bH20\b", 148.0),
    (r"\bA100\b", 312.0),
    (r"\bA800\b", 312.0),
    (r"\bA40\b", 149.7),
    (r"\bA30\b", 165.0),
    (r"\bA10\b", 125.0),
    (r"\bL40S\b", 362.0),
    (r"\bL4\b", 121.0),
    (r"\bRTX 4090\b", 165.2),
    (r"\bRTX 3090\b", 71.0),
    (r"\bMI300X\b", 1307.4),
    (r"\bMI325X\b", 1307.4),
    (r"\bMI355X\b", 2516.6),
)
# Devices that multiply float16 in their matrix units, and bfloat16 not.
DATASHEET_FLOAT16_TFLOPS = (
    (r"\bV100S\b", 130.0),
    (r"\bV100-PCIE\b", 112.0),
    (r"\bV100\b", 125.0),
    (r"\bT4\b", 65.0),
)


def datasheet_flops(device_name: str, dtype: str) -> float | None:
    """A device's peak in operations per second by its maker's data sheet, or None if it is not known here.

    device_name as torch.cuda.get_device_name gives it; dtype: float16 or bfloat16; for others, None.
    """
    rows = DATASHEET_TFLOPS if dtype in ("float16", "bfloat16") else ()
    if dtype == "float16":
        rows = (*rows, *DATASHEET_FLOAT16_TFLOPS)
    if re.search(r"\bMIG\b", device_name):
        return None
    return next((tflops * TERA for pattern, tflops in rows if re.search(pattern, device_name)), None)

"""A fine-tuned BERT from its run directory, and how often it is right about pairs of sentences."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalith.data.pair_files import ClassBatches, read_pairs
from megalith.data.tokenizer import load_saved_tokenizer
from megalith.derived import sequence_length
from megalith.models.bert import Bert
from megalith.tasks.classify import layout_of
from megalith.terminal import printable
from megalith.trained import compute_type, load_weights, run_of

PAIRS_AT_ONCE = 64


@torch.no_grad()
def measure_pairs(
    directory: str, *, split: str | None, files: Sequence[str], step: int | None, device: str
) -> dict[str, Any]:
    """Loss and accuracy over all pairs of a split of the run's data, or of other files, as one object.

    Raises ValueError for no run directory, a split that there is not, or a file that is not as its format says.
    """
    run = run_of(directory)
    parts = {"train": run.data.train_data, "valid": run.data.valid_data}
    name = split or "valid"
    if not files and name not in parts:
        raise ValueError(f"--split = {name}: pairs have no such part. Use {' or '.join(parts)}.")
    paths = list(files) or list(parts[name] or ())
    if not paths:
        raise ValueError(f"--split = {name}: the run has no pairs for it. Name some: --file FILE.")
    layout = layout_of(run)
    tokenizer = load_saved_tokenizer(Path(directory) / "tokenizer")
    pairs = read_pairs(paths, layout, warn=lambda text: print(f"warning: {printable(text)}", file=sys.stderr))
    batches = ClassBatches(pairs, tokenizer, length=sequence_length(run))
    chosen, dtype = compute_type(run, device)
    model, found_step = load_weights(
        directory,
        lambda index: Bert(
            run.model,
            int(index.state["model"]["padded_vocab_size"]),
            dtype=dtype,
            head="classification",
            num_classes=len(layout.classes),
            device="meta",
        ).to_empty(device=chosen),
        step=step,
        tokenizer=tokenizer,
    )
    total = np.zeros(2)
    for first in range(0, len(batches), PAIRS_AT_ONCE):
        numbers = np.arange(first, min(first + PAIRS_AT_ONCE, len(batches)))
        batch = {entry: torch.from_numpy(array).to(chosen) for entry, array in batches.read(numbers, numbers).items()}
        sums = model.eval()(
            batch["tokens"],
            batch["types"],
            padding=batch["padding"],
            classes=batch["classes"],
            class_weights=batch["class_mask"],
        )
        total += sums.double().cpu().numpy()
    return {
        "run": directory,
        "step": found_step,
        "data": list(files) or name,
        "pairs": len(batches),
        "loss": float(total[0]) / len(batches),
        "accuracy": float(total[1]) / len(batches),
    }

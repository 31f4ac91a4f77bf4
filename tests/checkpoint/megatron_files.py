"""Checkpoints as Megatron-LM writes them, built here from whole tensors by torch.save and plain slicing.

Nothing of the converter is used: cuts, orders and layouts are spelled out again.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

WIDTH, HEADS, LAYERS, POSITIONS, VOCABULARY = 8, 4, 4, 16, 264
ROWS = ("query_key_value.weight", "query_key_value.bias", "dense_h_to_4h.weight", "dense_h_to_4h.bias")
COLUMNS = ("self_attention.dense.weight", "dense_4h_to_h.weight")
LAYER = {
    "input_layernorm.weight": (WIDTH,),
    "input_layernorm.bias": (WIDTH,),
    "self_attention.query_key_value.weight": (3 * WIDTH, WIDTH),
    "self_attention.query_key_value.bias": (3 * WIDTH,),
    "self_attention.dense.weight": (WIDTH, WIDTH),
    "self_attention.dense.bias": (WIDTH,),
    "post_attention_layernorm.weight": (WIDTH,),
    "post_attention_layernorm.bias": (WIDTH,),
    "mlp.dense_h_to_4h.weight": (4 * WIDTH, WIDTH),
    "mlp.dense_h_to_4h.bias": (4 * WIDTH,),
    "mlp.dense_4h_to_h.weight": (WIDTH, 4 * WIDTH),
    "mlp.dense_4h_to_h.bias": (WIDTH,),
}


@dataclass(frozen=True)
class Case:
    """How a checkpoint is cut and what it holds."""

    tensor: int = 1
    stages: int = 1
    chunks: int = 1
    dtype: torch.dtype = torch.float16
    by_apex: bool = False  # its Adam counts steps by group

    def __str__(self) -> str:
        return f"tp{self.tensor}-pp{self.stages}-vp{self.chunks}-{self.dtype}".replace("torch.", "")


def whole_tensors() -> dict[str, dict[str, Tensor]]:
    """The weight and moments of every parameter, whole, by Megatron-LM's name with the layer's number in the model."""
    shapes: dict[str, tuple[int, ...]] = {"word": (VOCABULARY, WIDTH), "position": (POSITIONS, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in LAYER.items()}
    shapes |= {"final_layernorm.weight": (WIDTH,), "final_layernorm.bias": (WIDTH,)}
    generator = torch.Generator().manual_seed(5)
    return {
        name: {
            "main": torch.randn(shape, generator=generator),
            "exp_avg": torch.randn(shape, generator=generator),
            "exp_avg_sq": torch.rand(shape, generator=generator),
        }
        for name, shape in shapes.items()
    }


def arguments(case: Case, rank: int) -> argparse.Namespace:
    """Those of Megatron-LM's arguments that a converter may look at, some with what Megatron-LM filled in."""
    return argparse.Namespace(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        ffn_hidden_size=4 * WIDTH,
        num_attention_heads=HEADS,
        kv_channels=WIDTH // HEADS,
        max_position_embeddings=POSITIONS,
        seq_length=POSITIONS,
        encoder_seq_length=POSITIONS,
        make_vocab_size_divisible_by=8 // case.tensor,
        padded_vocab_size=VOCABULARY,
        tokenizer_type="ByteLevelTokenizer",
        micro_batch_size=2,
        global_batch_size=8,
        train_iters=100,
        lr=1.5e-4,
        min_lr=1e-5,
        lr_decay_style="cosine",
        lr_decay_iters=20,
        lr_warmup_fraction=0.1,
        lr_warmup_iters=0,
        weight_decay=0.01,
        fp16=case.dtype == torch.float16,
        bf16=case.dtype == torch.bfloat16,
        params_dtype=case.dtype,
        loss_scale=None,
        data_path=["/data/my-gpt2_text_document"],
        split="800,100,100",
        dataloader_type="single",
        save="/elsewhere/checkpoints",
        save_interval=10,
        load=None,
        seed=1234,
        tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.stages,
        virtual_pipeline_model_parallel_size=None if case.chunks == 1 else case.chunks,
        rank=rank,
        world_size=case.tensor * case.stages,
        consumed_train_samples=320,
        consumed_valid_samples=16,
        iteration=40,
    )


def write_checkpoint(directory: Path, case: Case) -> None:
    """A checkpoint of iteration 40, of which 15 steps were skipped."""
    tensors = whole_tensors()
    for stage in range(case.stages):
        for tensor_rank in range(case.tensor):
            name = f"mp_rank_{tensor_rank:02d}" + (f"_{stage:03d}" if case.stages > 1 else "")
            folder = directory / "iter_0000040" / name
            folder.mkdir(parents=True)
            torch.save(contents(case, tensors, tensor_rank, stage), folder / "model_optim_rng.pt")
    (directory / "latest_checkpointed_iteration.txt").write_text("40")


def contents(case: Case, tensors: dict[str, dict[str, Tensor]], tensor_rank: int, stage: int) -> dict[str, Any]:
    models, cuts = [], []
    for chunk in range(case.chunks):
        model: dict[str, Any] = {"language_model": {}}
        for path, name in names_in(case, stage, chunk):
            piece = {kind: cut(name, tensor, case, tensor_rank) for kind, tensor in tensors[name].items()}
            cuts.append(piece)
            place = model
            for key in path[:-1]:
                place = place.setdefault(key, {})
            place[path[-1]] = piece["main"].to(case.dtype)
        models.append(model)
    groups = [[p for p in cuts if p["main"].dim() > 1], [p for p in cuts if p["main"].dim() == 1]]
    return {
        "args": arguments(case, stage * case.tensor + tensor_rank),
        "checkpoint_version": 3.0,
        "iteration": 40,
        **({"model": models[0]} if case.chunks == 1 else {f"model{n}": model for n, model in enumerate(models)}),
        "optimizer": optimizer(case, groups),
        "lr_scheduler": {
            "max_lr": 1.5e-4,
            "warmup_steps": 16.0,
            "num_steps": 200,
            "decay_style": "cosine",
            "decay_steps": 160,
            "min_lr": 1e-5,
        },
        "random_rng_state": random.Random(1).getstate(),
        "np_rng_state": np.random.RandomState(1).get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
        "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
    }


def names_in(case: Case, stage: int, chunk: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys in the file and the parameter that stands there, in the order of the modules."""
    last = stage == case.stages - 1 and chunk == case.chunks - 1
    if stage == chunk == 0:
        yield ("language_model", "embedding", "word_embeddings", "weight"), "word"
        yield ("language_model", "embedding", "position_embeddings", "weight"), "position"
    per_chunk = LAYERS // case.stages // case.chunks
    start = chunk * case.stages * per_chunk + stage * per_chunk
    for layer in range(per_chunk):
        for name in LAYER:
            yield ("language_model", "encoder", f"layers.{layer}.{name}"), f"layers.{start + layer}.{name}"
    if last:
        for kind in ("weight", "bias"):
            yield ("language_model", "encoder", f"final_layernorm.{kind}"), f"final_layernorm.{kind}"
    if last and case.stages > 1:
        yield ("word_embeddings_for_head", "weight"), "word"


def cut(name: str, tensor: Tensor, case: Case, tensor_rank: int) -> Tensor:
    if name == "word" or name.endswith(ROWS):
        tensor = tensor.chunk(case.tensor)[tensor_rank]
    elif name.endswith(COLUMNS):
        tensor = tensor.chunk(case.tensor, dim=1)[tensor_rank]
    return tensor.clone()


def optimizer(case: Case, groups: list[list[dict[str, Tensor]]]) -> dict[str, Any]:
    states = [{"exp_avg": p["exp_avg"], "exp_avg_sq": p["exp_avg_sq"]} for group in groups for p in group]
    count: dict[str, Any] = {"step": 25} if case.by_apex else {}
    if not case.by_apex:
        states = [{"step": torch.tensor(25.0), **state} for state in states]
    first, total = len(groups[0]), len(states)
    common = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, **count}
    inner = {
        "state": dict(enumerate(states)),
        "param_groups": [
            {**common, "weight_decay": 0.01, "params": list(range(first))},
            {**common, "weight_decay": 0.0, "params": list(range(first, total))},
        ],
    }
    if case.dtype == torch.float32:
        return inner
    main = [[piece["main"] for piece in group] for group in groups]
    if case.dtype == torch.bfloat16:
        return {"optimizer": inner, "fp32_from_fp16_params": main}
    scaler = {"scale": torch.tensor([65536.0]), "growth_tracker": 24, "hysteresis_tracker": -13}
    return {"optimizer": inner, "grad_scaler": scaler, "fp32_from_fp16_params": main}

"""The fused update is torch.optim.AdamW's, bit for bit, and its making leaves the compiler alone."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from megalith.optim.groups import build_optimizer, set_learning_rate
from megalith.optim.settings import OptimizerConfig
from tests.optim.tensors import optimizer_tensors


def test_weights_and_state_are_those_of_torchs_fused_adamw() -> None:
    torch.manual_seed(1)
    ours, theirs = nn.Linear(33, 17), nn.Linear(33, 17)
    theirs.load_state_dict(ours.state_dict())
    config = OptimizerConfig(adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-6, weight_decay=0.1)
    optimizer = build_optimizer(ours, config)
    groups = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-6, fused=True)
    for rate in (0.0, 1e-2, 3e-3, 1e-3):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for either in (optimizer, reference):
            set_learning_rate(either, rate)
            either.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    state = optimizer_tensors(ours, optimizer)
    for name, parameter in theirs.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[f"{moment}.{name}"], reference.state[parameter][moment])


def test_a_parameter_without_gradient_is_left_alone() -> None:
    model = nn.Linear(4, 3)
    before = model.bias.detach().clone()
    optimizer = build_optimizer(model, OptimizerConfig())
    set_learning_rate(optimizer, 0.1)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert torch.equal(model.bias, before) and not optimizer.state[model.bias]


@pytest.mark.parametrize("words", ["", "--checkpoint-activations", "--recompute-granularity selective"])
def test_a_run_on_a_cpu_imports_neither_the_compiler_nor_sympy(words: str) -> None:
    code = """
import sys
from megalith.cli import main
words = "pretrain --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8"
words += " --micro-batch-size 2 --train-iters 2 --lr 1e-3 --mock-data --vocab-size 64 --device cpu --eval-iters 0"
assert main(words.split() + sys.argv[1:]) == 0
loaded = {"torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor", "tensorboard"} & sys.modules.keys()
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

"""A model that no memory holds is refused before anything is built; one that is not to be trained is not."""

import pytest
import torch

from megalith.parallel.mesh import Layout
from megalith.room import memory_of, refuse_what_cannot_fit
from megalith.sources import read_command_line

SMALL = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 1 --lr 1e-3 --train-iters 2 --mock-data""".split()
CPU = torch.device("cpu")
ONE = Layout(1, 0, 0, 1, 1)


@pytest.mark.parametrize("words", ["--hidden-size 1000000000", "--num-layers 100000000"])
def test_what_cannot_fit_is_refused_with_both_numbers(words: str) -> None:
    run = read_command_line([*SMALL, *words.split()])
    there = memory_of(CPU)
    assert there is not None
    with pytest.raises(ValueError, match=rf"take [\d,]+ GiB, and there are {there / 2**30:,.0f}\."):
        refuse_what_cannot_fit(run, ONE, CPU)
    refuse_what_cannot_fit(read_command_line([*SMALL, *words.split(), "--exit-before-training"]), ONE, CPU)


def test_what_fits_may_start() -> None:
    refuse_what_cannot_fit(read_command_line(SMALL), ONE, CPU)

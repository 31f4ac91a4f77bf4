"""A table that is looked up and scores tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.layers.embedding import Embedding
from megalith.layers.initial import ZEROS


def made(rows: int, width: int) -> Embedding:
    table = Embedding(rows, width, ZEROS)
    torch.nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(1))
    return table


def both_uses(rows: Tensor, table: Tensor) -> Tensor:
    """A scalar of rows looked up and of the whole table."""
    return rows.square().sum() + (rows.flatten(0, -2) @ table.t()).exp().sum()


def test_gradients_of_both_uses_add_up_where_ids_repeat() -> None:
    table, ids = made(7, 3), torch.tensor([[0, 3, 3], [6, 3, 0]])
    rows, shared = table.look_up_and_share(ids)
    assert torch.equal(rows, table.weight[ids]) and torch.equal(shared, table.weight)
    both_uses(rows, shared).backward()
    exact = table.weight.detach().double().requires_grad_()
    both_uses(F.embedding(ids, exact), exact).backward()
    assert table.weight.grad is not None and exact.grad is not None
    torch.testing.assert_close(table.weight.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_a_second_pass_adds_to_the_gradient() -> None:
    table, ids = made(7, 3), torch.tensor([[1, 5]])
    both_uses(*table.look_up_and_share(ids)).backward()
    assert table.weight.grad is not None
    once = table.weight.grad.clone()
    both_uses(*table.look_up_and_share(ids)).backward()
    assert torch.equal(table.weight.grad, 2 * once)


def test_the_gradient_of_the_scores_becomes_that_of_the_table() -> None:
    table, ids, met = made(7, 3), torch.tensor([[1, 5]]), []
    rows, shared = table.look_up_and_share(ids)
    shared.register_hook(lambda grad: met.append(grad.data_ptr()))
    (rows.sum() + (shared * 2).sum()).backward()
    assert table.weight.grad is not None and met == [table.weight.grad.data_ptr()]
    assert table.weight.grad[:, 0].tolist() == [2, 3, 2, 2, 2, 3, 2]


def test_a_table_that_is_looked_up_in_another_way_is_not_shared() -> None:
    table, ids = made(7, 3), torch.tensor([[1, 5]])
    table.look_up = lambda ids, weight: F.embedding(ids, weight) + 1
    rows, shared = table.look_up_and_share(ids)
    assert torch.equal(rows, table.weight[ids] + 1) and shared is table.weight

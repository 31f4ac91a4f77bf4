"""A bi-encoder over replicas has the losses, figures and gradients of one process with the whole microbatch."""

import torch
from torch import Tensor

from megalith.layers.initial import draw_weights
from megalith.layers.random import dropout_rows
from megalith.models.retrieval import Retriever
from megalith.models.settings import ModelConfig
from megalith.parallel.contrast import share_candidates
from tests.ranks import run_ranks

BATCH, CONTEXTS, LENGTH = 6, 3, 8


def make_model(*, shared: bool) -> Retriever:
    config = ModelConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        biencoder_projection_dim=4,
        biencoder_shared_query_context_model=shared,
    )
    model = Retriever(config, 40, scaled=True, report=(2, 9), report_rank=True)
    draw_weights(model, 7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that scores differ
    return model


def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    queries = torch.randint(1, 40, (BATCH, LENGTH), generator=generator)
    contexts = torch.randint(1, 40, (BATCH, CONTEXTS, LENGTH), generator=generator)
    real = torch.ones_like(contexts)
    real[2, 1:] = 0  # a question without wrong passages
    real[4, 0, 5:] = 0
    return {
        "queries_BT": queries,
        "contexts_BNS": contexts,
        "queries_real": torch.ones_like(queries),
        "contexts_real": real,
        "loss_weights": torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 1.0]) / 6,
        "rows": dropout_rows(3, torch.arange(BATCH), LENGTH * (1 + CONTEXTS)),
    }


def sums_and_gradients(model: Retriever, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    sums = model(**batch)
    sums.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return sums.detach(), gradients


def test_replicas_together_have_the_losses_and_gradients_of_one_process() -> None:
    for shared in (False, True):
        whole, gradients = sums_and_gradients(make_model(shared=shared), make_batch())
        assert 1.0 < whole[1] < BATCH * CONTEXTS and 0 <= whole[2] < whole[3] <= 100

        def on_rank(rank: int, shared: bool = shared) -> tuple[Tensor, dict[str, Tensor]]:
            model = make_model(shared=shared)
            share_candidates(model, torch.distributed.group.WORLD)
            half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
            return sums_and_gradients(model, {name: entry[half] for name, entry in make_batch().items()})

        parts = run_ranks(on_rank, 2)
        torch.testing.assert_close(parts[0][0] + parts[1][0], whole, rtol=1e-6, atol=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_passages_that_are_not_there_do_not_count() -> None:
    model, batch = make_model(shared=False), make_batch()
    # What stands in an absent passage, or in padding, changes nothing.
    before = model(**batch).detach()
    batch["contexts_BNS"] = torch.where(batch["contexts_real"] == 1, batch["contexts_BNS"], 39)
    torch.testing.assert_close(model(**batch).detach(), before, rtol=0, atol=0)
    # Nor does it matter whether they are absent or were never asked for.
    batch["contexts_real"][:, 1:] = 0
    fewer = {**batch, "contexts_BNS": batch["contexts_BNS"][:, :1], "contexts_real": batch["contexts_real"][:, :1]}
    fewer["rows"] = batch["rows"][:, : 2 * LENGTH]
    torch.testing.assert_close(model(**batch).detach(), model(**fewer).detach(), rtol=1e-6, atol=1e-6)


def test_a_score_that_is_not_a_number_is_no_success() -> None:
    model, batch = make_model(shared=False), make_batch()
    with torch.no_grad():
        model.get_parameter("towers.query.projection.bias").fill_(torch.nan)
    _, rank, first, second = model(**batch).detach()
    assert float(first) == float(second) == 0.0 and float(rank) >= BATCH

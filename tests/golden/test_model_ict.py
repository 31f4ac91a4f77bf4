"""The bi-encoder against numbers printed by Megatron-LM for tiny fp32 models on the CPU (tests/golden/data/README.md).

Both sides compute in fp32 with differently ordered sums; embeddings are below 5, so that rounding leaves some 1e-6.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalith.models.retrieval import Retriever
from tests.golden.test_model_gpt import RENAMED, fill, golden_config

VARIANTS = [(shared, width) for shared in (False, True) for width in (6, 0)]
TOWERS = {"query_model.": "towers.query.", "context_model.": "towers.context.", "model.": "towers.shared."}


def our_name(theirs: str) -> str:
    tower = next(name for name in TOWERS if theirs.startswith(name))
    name = theirs.removeprefix(tower)
    if name.startswith("projection_enc."):
        return TOWERS[tower] + name.replace("projection_enc", "projection")
    name = name.removeprefix("language_model.").replace("embedding.tokentype_embeddings", "token_type_embedding")
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return f"{TOWERS[tower]}encoder.{name}"


@pytest.fixture(scope="module")
def figures(golden: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((golden / "model_ict.json").read_text())
    return figures


def golden_retriever(figures: dict[str, Any], *, shared: bool, width: int, **options: Any) -> Retriever:
    config = golden_config(
        biencoder_shared_query_context_model=shared,
        biencoder_projection_dim=width,
    )
    model = Retriever(config, figures["padded_vocab_size"], **options)
    return fill(model, figures[f"shared={shared},projection={width}"]["parameters"], our_name)


def inputs_of(case: dict[str, Any]) -> dict[str, Tensor]:
    queries, contexts = torch.tensor(case["query"]), torch.tensor(case["context"])[:, None]
    return {
        "queries_BT": queries,
        "contexts_BNS": contexts,
        "queries_real": (queries >= 1).int(),
        "contexts_real": (contexts >= 1).int(),
        "loss_weights": torch.full((len(queries),), 1 / len(queries)),
    }


@pytest.mark.parametrize(("shared", "width"), VARIANTS)
def test_embeddings_scores_and_loss_are_those_of_megatron(figures: dict[str, Any], shared: bool, width: int) -> None:
    case = figures[f"shared={shared},projection={width}"]
    model = golden_retriever(figures, shared=shared, width=width, scaled=True, report=(1, 2))
    inputs = inputs_of(case)
    embedded = []
    for tower, name in ((model.query, "query"), (model.context, "context")):
        tokens = torch.tensor(case[name])
        embedded.append(tower(tokens, (tokens >= 1).int()))
        torch.testing.assert_close(embedded[-1], torch.tensor(case[f"{name}_embeddings"]), rtol=2e-6, atol=2e-6)
    scores = embedded[0] @ embedded[1].T / math.sqrt(16)
    torch.testing.assert_close(scores, torch.tensor(case["scores_scaled"]), rtol=2e-6, atol=5e-6)
    loss, first, second = model(**inputs).detach()
    assert float(loss) == pytest.approx(case["loss"], rel=2e-6)
    # The accuracies by their definition: how many are right among the k best.
    order = torch.tensor(case["scores_scaled"]).argsort(1, descending=True)
    for k, found in ((1, first), (2, second)):
        right = [row in order[row, :k].tolist() for row in range(3)]
        assert float(found) == pytest.approx(100 * sum(right) / 3)


@pytest.mark.parametrize(("shared", "width"), VARIANTS)
def test_gradients_are_those_of_the_written_out_loss(figures: dict[str, Any], shared: bool, width: int) -> None:
    """No gradients were printed: the loss is written out here, and differentiated in fp64."""
    case = figures[f"shared={shared},projection={width}"]
    model = golden_retriever(figures, shared=shared, width=width, scaled=True)
    model(**inputs_of(case))[0].backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    exact = golden_retriever(figures, shared=shared, width=width, dtype=torch.float64).double()
    queries, contexts = (torch.tensor(case[name]) for name in ("query", "context"))
    q, c = exact.query(queries, (queries >= 1).int()), exact.context(contexts, (contexts >= 1).int())
    assert q.dtype == torch.float64
    scores = q @ c.T / 4
    (-sum(scores[i, i] - scores[i].exp().sum().log() for i in range(3)) / 3).backward()
    for name, parameter in exact.named_parameters():
        assert parameter.grad is not None
        wanted, grad = parameter.grad, found[name]
        assert grad is not None
        # The largest gradients are 0.1 to 0.6; some sums of such terms cancel, and keep their terms' rounding.
        assert (grad - wanted).abs().max() <= 2e-6 * max(0.1, float(wanted.abs().max())), name

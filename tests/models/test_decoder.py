import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalith.layers.cache import KeyValueCache
from megalith.layers.initial import draw_weights
from megalith.layers.mask import Mask
from megalith.layers.random import dropout_rows
from megalith.models.decoder import Decoder
from megalith.models.settings import ModelConfig
from megalith.models.transformer import run_whole

B, T, V = 3, 10, 24
CONFIG = ModelConfig(
    num_layers=3, hidden_size=16, num_attention_heads=4, max_position_embeddings=12, init_method_std=0.3
)
STILL = dataclasses.replace(CONFIG, hidden_dropout=0.0, attention_dropout=0.0)
LLAMA = dataclasses.replace(
    STILL, normalization="RMSNorm", add_bias_linear=False, swiglu=True, position_embedding_type="rope"
)
GROUPED = dataclasses.replace(LLAMA, group_query_attention=True, num_query_groups=2)
QWEN = dataclasses.replace(GROUPED, add_qkv_bias=True, qk_layernorm=True, kv_channels=6)
KINDS = {"plain": STILL, "llama": LLAMA, "grouped": GROUPED, "qwen": QWEN}
POSITIONS = torch.arange(T).expand(B, T)
SAMPLES = torch.tensor([7, 0, 3])


def decoder(config: ModelConfig = CONFIG, **options: Any) -> Decoder:
    model = Decoder(config, V, **options)
    draw_weights(model, 1234)
    return model


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def tokens() -> Tensor:
    return torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(2))


def loss_of(model: Decoder, *, rows: Tensor | None = None, **options: Any) -> Tensor:
    weights = torch.full((B, T), 1 / (B * T))
    whole = tokens()
    loss: Tensor = model(whole[:, :-1], POSITIONS, labels=whole[:, 1:], loss_weights=weights, rows=rows, **options)
    return loss


def gradients(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_reference_shape_has_its_number_of_parameters() -> None:
    config = ModelConfig(num_layers=48, hidden_size=1600, num_attention_heads=16, max_position_embeddings=1024)
    assert num_parameters(Decoder(config, 50304, device="meta")) == 1_557_686_400


def test_names_are_by_layer_number() -> None:
    names = [name for name, _ in decoder().named_parameters()]
    assert names[:3] == ["word_embedding.weight", "position_embedding.weight", "layers.0.attention_norm.weight"]
    assert "layers.2.attention.qkv.weight" in names
    assert names[-1] == "final_norm.bias"


def test_an_untied_output_has_a_table_of_its_own() -> None:
    tied, untied = decoder(STILL), decoder(dataclasses.replace(STILL, untie_embeddings_and_output_weights=True))
    assert num_parameters(untied) - num_parameters(tied) == V * 16
    with torch.no_grad():
        untied.output.weight.copy_(tied.word_embedding.weight)
    torch.testing.assert_close(loss_of(untied), loss_of(tied))
    grads, split = gradients(tied, loss_of(tied)), gradients(untied, loss_of(untied))
    torch.testing.assert_close(
        split["word_embedding.weight"] + split["output.weight"], grads["word_embedding.weight"], rtol=0, atol=1e-6
    )


def test_the_loss_is_the_cross_entropy_of_the_logits() -> None:
    model = decoder(STILL)
    whole = tokens()
    logits = model(whole[:, :-1], POSITIONS)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole[:, 1:].flatten())
    torch.testing.assert_close(loss_of(model), expected)
    losses = model.token_losses(model.hidden(model.stream(whole[:, :-1], POSITIONS)), whole[:, 1:])
    torch.testing.assert_close(losses.mean(), expected.detach())


def test_dropout_only_happens_with_rows() -> None:
    rows = dropout_rows(1234, SAMPLES, T)
    model, still = decoder(), decoder(STILL)
    assert torch.equal(loss_of(model), loss_of(still))
    assert torch.equal(loss_of(still, rows=rows), loss_of(still))
    assert not torch.equal(loss_of(model, rows=rows), loss_of(still))


def test_microbatches_with_dropout_add_up_to_the_batch() -> None:
    model = decoder()
    whole, weights = tokens(), torch.full((B, T), 1 / (B * T))
    rows = dropout_rows(1234, SAMPLES, T)
    loss = loss_of(model, rows=rows)
    expected = gradients(model, loss)
    model.zero_grad()
    total = torch.zeros(())
    for b in range(B):
        one = slice(b, b + 1)
        alone = dropout_rows(1234, SAMPLES[one], T)
        part = model(whole[one, :-1], POSITIONS[one], labels=whole[one, 1:], loss_weights=weights[one], rows=alone)
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, loss.detach(), rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_in_a_sample_are_as_if_alone(kind: str) -> None:
    model = decoder(KINDS[kind])
    whole = tokens()[:, :-1]
    documents = torch.tensor([[0] * 4 + [1] * 6] * B, dtype=torch.int32)
    positions = torch.cat([POSITIONS[:, :4], POSITIONS[:, :6]], 1)
    together = model(whole, positions, documents=documents)
    for part in (slice(0, 4), slice(4, 10)):
        alone = model(whole[:, part], positions[:, part])
        torch.testing.assert_close(together[:, part], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(model(whole, positions)[:, 4:], together[:, 4:], atol=1e-3)


def test_recomputed_blocks_give_the_same_gradients_with_dropout() -> None:
    def recompute(blocks: list[nn.Module], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for block in blocks:
            x = torch.utils.checkpoint.checkpoint(
                block, x, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )
        return x

    model = decoder()
    rows = dropout_rows(1234, SAMPLES, T)
    expected = gradients(model, loss_of(model, rows=rows))
    assert model.run_blocks is run_whole
    model.run_blocks = recompute
    grads = gradients(model, loss_of(model, rows=rows))
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


def test_parts_of_a_model_have_its_weights_and_give_its_loss() -> None:
    whole = decoder()
    rows = dropout_rows(1234, SAMPLES, T)
    front = decoder(layers=range(2), last=False)
    back = decoder(layers=[2], first=False)
    weights = dict(whole.named_parameters())
    for part in (front, back):
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, weights[name])
    assert {name for part in (front, back) for name, _ in part.named_parameters()} == set(weights)
    inputs = tokens()
    stream = front(inputs[:, :-1], POSITIONS, rows=rows)
    loss = back(stream, POSITIONS, rows=rows, labels=inputs[:, 1:], loss_weights=torch.full((B, T), 1 / (B * T)))
    assert torch.equal(loss, loss_of(whole, rows=rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_stream", [False, True])
def test_16_bit_losses_and_gradients_are_finite_and_near_fp32(dtype: torch.dtype, wide_stream: bool) -> None:
    config = dataclasses.replace(CONFIG, fp32_residual_connection=wide_stream)
    rows = dropout_rows(1234, SAMPLES, T)
    exact, model = decoder(), decoder(config, dtype=dtype)
    loss, expected = loss_of(model, rows=rows), loss_of(exact, rows=rows)
    assert loss.dtype == torch.float32
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected, rtol=4 * rounding, atol=0)
    grads, expected_grads = gradients(model, loss), gradients(exact, expected)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        if not name.endswith("qkv.bias"):  # A key bias has no gradient but rounding.
            error = (grad - expected_grads[name]).norm() / expected_grads[name].norm()
            # Three layers of a dozen roundings each, in both directions.
            assert error < 16 * rounding, name
    stream = model.embed(tokens(), torch.arange(T + 1).expand(B, -1), None)
    assert stream.dtype == (torch.float32 if wide_stream else dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_tokens_give_the_logits_of_the_whole_sequence(kind: str) -> None:
    model = decoder(KINDS[kind])
    whole = tokens()[:, :-1]
    expected = model(whole, POSITIONS)
    cache = KeyValueCache(B, T, device=torch.device("cpu"))
    logits = []
    with torch.no_grad():
        for part in (slice(0, 4), slice(4, 5), slice(5, 10)):
            logits.append(model(whole[:, part], POSITIONS[:, part], cache=cache))
            cache.advance([part.stop - part.start] * B)
    torch.testing.assert_close(torch.cat(logits, 1), expected.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_rows_of_different_lengths_do_not_see_each_others_padding(kind: str) -> None:
    model = decoder(KINDS[kind])
    whole = tokens()[:, :-1]
    lengths = [4, 1, 6]
    cache = KeyValueCache(B, T, device=torch.device("cpu"))
    with torch.no_grad():
        model(whole[:, :6], POSITIONS[:, :6], cache=cache)  # the shorter rows' last tokens count as padding
        cache.advance(lengths)
        places = torch.tensor(lengths)[:, None]
        new = whole.gather(1, places)
        logits = model(new, places, cache=cache)
        for b, length in enumerate(lengths):
            alone = model(whole[b : b + 1, : length + 1], POSITIONS[:1, : length + 1])
            torch.testing.assert_close(logits[b, 0], alone[0, -1], rtol=0, atol=1e-5)


def test_rotary_positions_need_no_table_and_tell_distances_alone() -> None:
    model, tabled = decoder(LLAMA), decoder(dataclasses.replace(LLAMA, position_embedding_type="learned_absolute"))
    assert num_parameters(tabled) - num_parameters(model) == 12 * 16
    whole = tokens()[:, :-1]
    torch.testing.assert_close(model(whole, POSITIONS + 90), model(whole, POSITIONS), rtol=0, atol=1e-4)
    assert not torch.allclose(model(whole, POSITIONS * 2), model(whole, POSITIONS), atol=1e-2)


def test_a_cache_holds_as_many_heads_as_keys_have() -> None:
    cache = KeyValueCache(B, T, device=torch.device("cpu"))
    with torch.no_grad():
        decoder(GROUPED)(tokens()[:, :4], POSITIONS[:, :4], cache=cache)
    assert [k.shape for k, _ in cache._kept.values()] == [(B, 2, T, 4)] * 3


def test_groups_of_one_head_are_heads() -> None:
    config = dataclasses.replace(STILL, group_query_attention=True, num_query_groups=4)
    assert torch.equal(loss_of(decoder(config)), loss_of(decoder(STILL)))


def test_a_full_cache_refuses_more() -> None:
    model = decoder(STILL)
    cache = KeyValueCache(B, 4, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of 4"):
        model(tokens()[:, :5], POSITIONS[:, :5], cache=cache)


def test_the_seams_are_used() -> None:
    model = decoder(STILL)
    expected = loss_of(model)
    calls = []
    make, score, entropy = model.mask_for, model.score, model.cross_entropy

    def mask_for(*args: Any, **kwargs: Any) -> Mask:
        calls.append("mask")
        return make(*args, **kwargs)

    def cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append("loss")
        return entropy(*args, **kwargs)

    model.mask_for, model.cross_entropy = mask_for, cross_entropy
    model.score = lambda *args, **kwargs: 2 * score(*args, **kwargs)
    assert torch.equal(loss_of(model), expected)
    assert calls == ["mask", "loss"]
    inputs = tokens()[:, :-1]
    assert torch.equal(model(inputs, POSITIONS), 2 * decoder(STILL)(inputs, POSITIONS))


def test_a_model_at_its_start_loses_what_a_uniform_guess_loses_and_a_little_more() -> None:
    # Logits of a fresh model have variance width x std^2, which adds about half of that to the loss.
    config = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, max_position_embeddings=64)
    model = Decoder(config, 1000)
    draw_weights(model, 1234)
    tokens = torch.randint(1000, (8, 65), generator=torch.Generator().manual_seed(3))
    stream = model.stream(tokens[:, :-1], torch.arange(64).expand(8, 64))
    losses = model.token_losses(model.hidden(stream), tokens[:, 1:])
    expected = torch.tensor(1000.0).log() + 64 * 0.02**2 / 2
    assert float(losses.mean()) == pytest.approx(float(expected), abs=0.02)

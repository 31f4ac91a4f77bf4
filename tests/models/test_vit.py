"""ViT: patches, positions, first weights, dropout, and parts that make up the whole."""

from typing import Any

import pytest
import torch

from megalith.layers.initial import draw_weights
from megalith.layers.random import dropout_rows
from megalith.models.settings import ModelConfig
from megalith.models.vit import VisionTransformer, centred, cut_patches, num_places, resized_positions

SETTINGS: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "max_position_embeddings": 1,
    "img_dim": 8,
    "patch_dim": 4,
    "num_channels": 3,
    "num_classes": 5,
}


def model_of(*, finetune: bool = False, seed: int = 1, **settings: Any) -> VisionTransformer:
    model = VisionTransformer(ModelConfig(**(SETTINGS | settings)), finetune=finetune)
    draw_weights(model, seed)
    return model


def images(count: int, *, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 8, 8, 3), dtype=torch.uint8, generator=generator)


def test_patches_go_row_by_row_and_are_flattened_by_row_column_channel() -> None:
    image = torch.arange(8 * 12 * 3).view(1, 8, 12, 3)
    patches = cut_patches(image, 4)
    assert patches.shape == (1, 6, 48)
    for row in range(2):
        for column in range(3):
            wanted = image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1)
            assert torch.equal(patches[0, 3 * row + column], wanted)


def test_bytes_become_numbers_between_minus_one_and_one() -> None:
    values = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(centred(values), torch.tensor([-1.0, -0.6, 1.0]))


def test_positions_of_another_grid_are_between_the_old_ones() -> None:
    # A table that grows evenly along rows and columns, at the centres of the patches.
    centres = (torch.arange(4) + 0.5) / 4
    down, right = centres.repeat_interleave(4), centres.repeat(4)
    table = torch.cat([torch.tensor([[7.0, 8.0]]), torch.stack([down, right], 1)])
    for side in (2, 3, 4, 6, 8):
        resized = resized_positions(table, side**2 + 1)
        assert torch.equal(resized[0], table[0])
        centres = ((torch.arange(side) + 0.5) / side).clamp(1 / 8, 7 / 8)  # beyond the outermost centres it is flat
        wanted = torch.stack([centres.repeat_interleave(side), centres.repeat(side)], 1)
        torch.testing.assert_close(resized[1:], wanted)
    assert torch.equal(resized_positions(table, 17), table)
    for rows, places in ((16, 10), (17, 11), (17, 1)):
        with pytest.raises(ValueError, match="does not fit"):
            resized_positions(torch.zeros(rows, 2), places)


def test_first_weights_are_those_of_megatron() -> None:
    weights = dict(model_of(hidden_size=64).named_parameters())
    assert not weights["class_token"].any()
    assert weights["pretraining_head.output.bias"].tolist() == [-10.0] * 5
    assert float(weights["position_embedding.weight"].detach().std()) == pytest.approx(0.02, rel=0.15)
    for name, inputs in (("patch_embedding", 48), ("pretraining_head.inner", 64), ("pretraining_head.output", 64)):
        largest = float(weights[f"{name}.weight"].detach().abs().max())
        assert 0.9 * inputs**-0.5 < largest <= inputs**-0.5
    assert float(weights["layers.0.attention.qkv.weight"].detach().std()) == pytest.approx(0.02, rel=0.1)


def test_xavier_bounds_every_matrix_of_the_blocks_by_its_sizes() -> None:
    weights = dict(model_of(hidden_size=64, init_method_xavier_uniform=True).named_parameters())
    matrices = [name for name, weight in weights.items() if name.startswith("layers.") and weight.dim() == 2]
    assert len(matrices) == 12
    for name in matrices:
        outputs, inputs = weights[name].shape
        bound = (6 / (inputs + outputs)) ** 0.5
        assert 0.95 * bound < float(weights[name].detach().abs().max()) <= bound
    assert float(weights["position_embedding.weight"].detach().std()) == pytest.approx(0.02, rel=0.15)


def test_the_fine_tuning_head_starts_without_an_opinion() -> None:
    model = model_of(finetune=True)
    assert not model(images(3)).any()
    loss, _ = model(images(3), labels=torch.tensor([0, 1, 2]), loss_weights=torch.full((3,), 1 / 3)).detach()
    assert float(loss) == pytest.approx(torch.log(torch.tensor(5.0)).item())


def test_weights_count_only_some_of_the_images() -> None:
    model, labels = model_of(), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        scores = model(images(4))
        loss, right = model(images(4), labels=labels, loss_weights=torch.tensor([0.5, 0.0, 0.25, 0.0]))
    losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
    torch.testing.assert_close(loss, losses[0] / 2 + losses[2] / 4)
    hits = (scores.argmax(-1) == labels).float()
    torch.testing.assert_close(right, hits[0] / 2 + hits[2] / 4)


def test_an_image_is_seen_alike_beside_any_others_with_dropout_too() -> None:
    model = model_of().eval()
    rows = dropout_rows(1, torch.arange(4), num_places(model.config))
    together = model(images(4), rows=rows)
    for number in range(4):
        alone = model(images(4)[number : number + 1], rows=rows[number : number + 1])
        torch.testing.assert_close(alone[0], together[number], rtol=0, atol=1e-5)
    assert not torch.allclose(together, model(images(4)))
    assert not torch.allclose(together, model(images(4), rows=dropout_rows(2, torch.arange(4), 5)))


def test_parts_make_up_the_whole() -> None:
    whole = model_of()
    config = whole.config
    ends = [(range(0, 1), True, False), (range(1, 3), False, False), (range(3, 3), False, True)]
    stream, rows = images(2), dropout_rows(1, torch.arange(2), num_places(config))
    for layers, first, last in ends:
        part = VisionTransformer(config, layers=layers, first=first, last=last)
        draw_weights(part, 1)
        stream = part(stream, rows=rows)
    assert torch.equal(stream, whole(images(2), rows=rows))

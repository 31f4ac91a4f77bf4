"""ViT: a transformer over the patches of an image that says which class the image is of.

Shape letters: B batch, N patch, T place (the class token, then the patches), P features of a patch, D width, C class.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.embedding import Embedding
from megalith.layers.initial import ZEROS, Initial, xavier
from megalith.layers.linear import Linear
from megalith.layers.random import key
from megalith.models.settings import ModelConfig
from megalith.models.shape import initial_weights, shape_of
from megalith.models.transformer import Transformer

# Every class starts unlikely, as if scored by itself; the softmax over all of them does not see it.
FIRST_BIAS = -10.0


def num_patches(config: ModelConfig) -> int:
    """Patches of an image. The side of a patch divides that of the image."""
    return (config.img_dim // config.patch_dim) ** 2


def num_places(config: ModelConfig) -> int:
    """Places in the stream: the class token and the patches."""
    return num_patches(config) + 1


class VisionTransformer(Transformer):
    """A transformer without mask over patches (ViT, Dosovitskiy et al. 2020, arXiv:2010.11929), as Megatron-LM has it.

    The class is read at the class token, which stands in front: for pretraining through a layer with tanh, for
    fine-tuning by one linear layer that starts at zero. layers, first, last, dtype: as for `Transformer`.

    Seams for parallelism: those of `Transformer`; cut gives the places of the stream as well as of dropout rows, joined
    all places of a stream again.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        finetune: bool = False,
        layers: Iterable[int] | None = None,
        first: bool = True,
        last: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, dtype=dtype, first=first, last=last)
        width = shape_of(config).width
        if first:
            num_features = config.patch_dim**2 * config.num_channels
            self.initial = {"class_token": ZEROS}
            self.class_token = nn.Parameter(torch.empty(width, dtype=torch.float32, device=device))
            self.patch_embedding = _plain_linear(num_features, width, device=device)
            positions, _ = initial_weights(config)
            self.position_embedding = Embedding(num_places(config), width, positions, device=device)
        self.layers = self.make_blocks(layers, device=device)
        if config.init_method_xavier_uniform:
            _start_by_xavier(self.layers)
        if last:
            self.final_norm = self.make_norm(device=device)
            if finetune:
                self.finetuning_head = Linear(width, config.num_classes, ZEROS, device=device)
            else:
                self.pretraining_head = PretrainingHead(width, config.num_classes, device=device)
        self.joined: Callable[[Tensor], Tensor] | None = None

    def forward(
        self,
        images: Tensor,
        *,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        """Scores BC, or with labels (int64 B) two fp32 sums over images: weight x cross entropy, weight x is right.

        images: uint8 [B, row, column, channel]. rows: int32 BT from `dropout_rows`; None: no dropout. loss_weights:
        fp32 B. A part of a model that is not first takes the stream BTD for images; one that is not last returns it.
        """
        x_BTD = self.embed(images, rows) if self.first else images
        mask = self.mask_for(num_places(self.config), causal=False)
        x_BTD = self.run_blocks(list(self.layers.values()), x_BTD, mask, rows)
        if not self.last:
            return x_BTD
        scores_BC = self.scores(x_BTD)
        if labels is None:
            return scores_BC
        assert loss_weights is not None, "labels come with loss weights"
        losses_B = F.cross_entropy(scores_BC.float(), labels, reduction="none")
        right_B = (scores_BC.detach().argmax(-1) == labels).float()
        return torch.stack([losses_B @ loss_weights, right_B @ loss_weights])

    def embed(self, images: Tensor, rows_BT: Tensor | None) -> Tensor:
        """BTD: the stream that enters the first block."""
        patches_BNP = cut_patches(centred(images), self.config.patch_dim)
        patches_BND = self.patch_embedding(patches_BNP.to(self.dtype))
        token_B1D = self.class_token.to(self.dtype).expand(len(images), 1, -1)
        x_BTD = torch.cat([token_B1D, patches_BND], 1) + self.position_embedding.weight
        if self.cut is not None:
            x_BTD = self.cut(self.in_stream_type(x_BTD))
        return self.entering(x_BTD, rows_BT, key("dropout", "embedding"))

    def scores(self, x_BTD: Tensor) -> Tensor:
        """BC: from the stream after the last block."""
        hidden_BTD = self.hidden(x_BTD)
        if self.joined is not None:
            hidden_BTD = self.joined(hidden_BTD)
        head = self.pretraining_head if hasattr(self, "pretraining_head") else self.finetuning_head
        scores_BC: Tensor = head(hidden_BTD[:, 0])
        return scores_BC


class PretrainingHead(nn.Module):
    """Scores of the classes through one more layer with tanh."""

    def __init__(self, width: int, num_classes: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.inner = _plain_linear(width, width, device=device)
        self.output = _plain_linear(width, num_classes, device=device)
        self.output.initial["bias"] = Initial("constant", FIRST_BIAS)

    def forward(self, x_BD: Tensor) -> Tensor:
        scores_BC: Tensor = self.output(torch.tanh(self.inner(x_BD)))
        return scores_BC


def centred(images: Tensor) -> Tensor:
    """fp32 between -1 and 1 from uint8: the values between 0 and 1 less 0.5, divided by 0.5."""
    return images.float() * (2 / 255) - 1


def cut_patches(images: Tensor, side: int) -> Tensor:
    """BNP from [B, row, column, channel]: patches row by row, each flattened in the order (row, column, channel)."""
    down: Tensor = images.unflatten(1, (-1, side)).unflatten(3, (-1, side))
    patches_BNP: Tensor = down.transpose(2, 3).flatten(3).flatten(1, 2)
    return patches_BNP


def resized_positions(table_TD: Tensor, places: int) -> Tensor:
    """The position table for that many places: the grid of the patches is resized bilinearly, the class token's stays.

    Raises ValueError unless both hold a class token and a square of patches.
    """
    old, new = (round((count - 1) ** 0.5) for count in (len(table_TD), places))
    if old < 1 or new < 1 or old**2 + 1 != len(table_TD) or new**2 + 1 != places:
        raise ValueError(f"a table of {len(table_TD)} positions does not fit {places}: a square and one are needed")
    grid = table_TD[1:].T.unflatten(1, (old, old))[None]
    resized = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=False)
    return torch.cat([table_TD[:1], resized[0].flatten(1).T])


def _plain_linear(inputs: int, outputs: int, *, device: torch.device | str | None) -> Linear:
    """A linear layer that starts as torch.nn.Linear does: Megatron-LM leaves it at that outside the blocks."""
    initial = Initial("uniform", inputs**-0.5)
    linear = Linear(inputs, outputs, initial, device=device)
    linear.initial["bias"] = initial
    return linear


def _start_by_xavier(blocks: nn.Module) -> None:
    """Let all matrices of the blocks start uniformly by their sizes, those back to the stream too; in place."""
    for module in blocks.modules():
        if isinstance(module, Linear):
            outputs, inputs = module.weight.shape
            module.initial["weight"] = xavier(inputs, outputs)

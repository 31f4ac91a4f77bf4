"""Tensor parallelism: one table from layer class to how its weights are cut over the ranks of the tensor axis.

A column-parallel product gives each rank some output features (Shoeybi et al. 2019, arXiv:1909.08053), the row-parallel
one after it takes them and sums; heads and inner features stay on their rank in between. With a cut sequence
(Korthikanti et al. 2022, arXiv:2205.05198) the stream between blocks is cut along the tokens, and the sums become
reduce-scatters. Nothing else in the package knows about either; a new layer class with weights needs a row in SPLITS.

Shape letters: B batch, T token, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from megalith.layers.attention import CrossAttention, SelfAttention
from megalith.layers.block import Block
from megalith.layers.embedding import Embedding
from megalith.layers.feedforward import FeedForward
from megalith.layers.linear import Linear
from megalith.layers.norm import LayerNorm, RMSNorm
from megalith.layers.relative import RelativePositions
from megalith.models.bert import Bert, TokenHead
from megalith.models.decoder import Decoder
from megalith.models.retrieval import Tower
from megalith.models.t5 import T5
from megalith.models.transformer import LanguageModel
from megalith.models.vit import VisionTransformer
from megalith.parallel import sequence
from megalith.parallel.collectives import Group, rank_in, reduce_from_group, size_of
from megalith.parallel.entering import Copied, Gathered
from megalith.parallel.vocabulary import cut_cross_entropy, cut_logits, look_up_cut_table


@dataclass(frozen=True)
class Cut:
    """What this rank holds of a parameter: its place in the whole, and whether its gradient is only part of a sum."""

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    is_copy: bool  # every tensor rank holds the same
    partial_gradient: bool = False  # each tensor rank has that of its own tokens or heads only


@dataclass
class Cutter:
    """Cuts the modules of a model in place and remembers what it did, by parameter name."""

    group: Group
    sequence: bool  # the stream between blocks is cut along the tokens
    cuts: dict[str, Cut] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return size_of(self.group)

    @property
    def rank(self) -> int:
        return rank_in(self.group)

    def rows_of(self, total: int) -> tuple[int, int]:
        """First and number of this rank's share of `total`; the last rank's is smaller where they do not divide."""
        share = -(-total // self.size)
        first = min(self.rank * share, total)
        return first, min(share, total - first)

    def cut_parameter(
        self, module: nn.Module, path: str, name: str, dim: int | None, *, of_heads: bool = False
    ) -> None:
        """Keep only this rank's part of a parameter along dim; None keeps it whole. of_heads: all heads share it."""
        parameter = getattr(module, name)
        whole, offset = tuple(parameter.shape), [0] * parameter.dim()
        if dim is not None:
            offset[dim], count = self.rows_of(whole[dim])
            local = parameter.data.narrow(dim, offset[dim], count).clone()
            setattr(module, name, nn.Parameter(local))
        partial_gradient = dim is None and (self.sequence or of_heads)
        self.cuts[f"{path}.{name}".removeprefix(".")] = Cut(whole, tuple(offset), dim is None, partial_gradient)

    def columns(self, linear: Linear, path: str) -> None:
        """Each rank gives some of the output features."""
        self.cut_parameter(linear, path, "weight", 0)
        if linear.bias is not None:
            self.cut_parameter(linear, path, "bias", 0)
        linear.enter = Gathered(self.group) if self.sequence else Copied(self.group)

    def rows(self, linear: Linear, path: str) -> None:
        """Each rank takes some of the input features; the products are summed, then the bias is added once."""
        self.cut_parameter(linear, path, "weight", 1)
        if linear.bias is not None:
            self.cut_parameter(linear, path, "bias", None)
        linear.leave = (
            partial(sequence.cut_sum, group=self.group)
            if self.sequence
            else partial(reduce_from_group, group=self.group)
        )


def _cut_self_attention(module: SelfAttention, path: str, cutter: Cutter) -> None:
    heads = module.out.weight.shape[1] // module.head_width
    cutter.columns(module.qkv, f"{path}.qkv")
    cutter.rows(module.out, f"{path}.out")
    for name, norm in (("q_norm", module.q_norm), ("k_norm", module.k_norm)):
        if norm is not None:
            for kind, _ in list(norm.named_parameters()):
                cutter.cut_parameter(norm, f"{path}.{name}", kind, None, of_heads=True)
    module.head_offset = cutter.rows_of(heads)[0]


def _cut_cross_attention(module: CrossAttention, path: str, cutter: Cutter) -> None:
    heads = module.out.weight.shape[1] // module.head_width
    cutter.columns(module.query, f"{path}.query")
    cutter.columns(module.key_value, f"{path}.key_value")
    cutter.rows(module.out, f"{path}.out")
    module.head_offset = cutter.rows_of(heads)[0]


def _cut_feed_forward(module: FeedForward, path: str, cutter: Cutter) -> None:
    cutter.columns(module.up, f"{path}.up")
    if module.gate is not None:
        cutter.columns(module.gate, f"{path}.gate")
        # What both take comes together once, and so does its gradient.
        module.enter, module.up.enter, module.gate.enter = module.up.enter, None, None
    cutter.rows(module.down, f"{path}.down")


def _copy_norm(module: LayerNorm | RMSNorm, path: str, cutter: Cutter) -> None:
    for name, _ in list(module.named_parameters()):
        # An attention has cut its own, whose heads share them.
        if f"{path}.{name}" not in cutter.cuts:
            cutter.cut_parameter(module, path, name, None)


def _cut_relative_positions(module: RelativePositions, path: str, cutter: Cutter) -> None:
    cutter.cut_parameter(module, path, "weight", 1)


def _cut_block(module: Block, path: str, cutter: Cutter) -> None:
    if cutter.sequence:
        module.cut = partial(sequence.cut, group=cutter.group)


def _cut_language_model(module: LanguageModel, path: str, cutter: Cutter) -> None:
    """The tables, and the scores of tokens: what models of tokens have outside of their blocks."""
    first = 0
    for name, child in list(module.named_children()):
        child_path = f"{path}.{name}".removeprefix(".")
        if name == "word_embedding" and isinstance(child, Embedding):
            first = cut_vocabulary(child, child_path, cutter)
        elif isinstance(child, Embedding):
            copy_table(child, child_path, cutter)
        elif name == "output" and isinstance(child, Linear):
            first, _ = cutter.rows_of(child.weight.shape[0])
            cutter.cut_parameter(child, child_path, "weight", 0)
    if cutter.sequence:
        module.cut = partial(sequence.cut, group=cutter.group)
    module.score = partial(cut_logits, group=cutter.group, sequence=cutter.sequence)
    module.cross_entropy = partial(cut_cross_entropy, first=first, group=cutter.group, sequence=cutter.sequence)


def _cut_vision_transformer(module: VisionTransformer, path: str, cutter: Cutter) -> None:
    """What is outside the blocks is small, and every rank holds all of it and computes it for all places alike."""
    for name, parameter in module.named_parameters():
        if not name.startswith(("layers.", "final_norm.")):
            cutter.cuts[name] = _copy_of(parameter)
    if cutter.sequence:
        module.cut = partial(sequence.cut, group=cutter.group)
        module.joined = partial(sequence.join, group=cutter.group)


def _cut_bert(module: Bert, path: str, cutter: Cutter) -> None:
    """The blocks, the tables and the scores of tokens are cut; pooler and what reads it are small and held whole."""
    _cut_language_model(module, path, cutter)
    held = dict(module.named_children())
    for name in ("pooler", "binary_head", "classification_head"):
        for kind, parameter in held[name].named_parameters() if name in held else ():
            cutter.cuts[f"{path}.{name}.{kind}".removeprefix(".")] = _copy_of(parameter)
    if cutter.sequence:
        module.first_token = partial(sequence.first_of_each, group=cutter.group)


def _cut_t5(module: T5, path: str, cutter: Cutter) -> None:
    _cut_language_model(module, path, cutter)
    if module.output_bias is not None:
        cutter.cut_parameter(module, path, "output_bias", 0)


def _cut_token_head(module: TokenHead, path: str, cutter: Cutter) -> None:
    cutter.cut_parameter(module.dense, f"{path}.dense", "weight", None)
    cutter.cut_parameter(module.dense, f"{path}.dense", "bias", None)
    cutter.cut_parameter(module, path, "bias", 0)


def _copy_of(parameter: Tensor) -> Cut:
    return Cut(tuple(parameter.shape), (0,) * parameter.dim(), is_copy=True)


def _copy_projection(module: Tower, path: str, cutter: Cutter) -> None:
    """Every rank projects the embedding, which all of them have."""
    for name, parameter in module.named_parameters(prefix=path):
        if name.startswith(f"{path}.projection."):
            cutter.cuts[name] = _copy_of(parameter)


def cut_vocabulary(table: Embedding, path: str, cutter: Cutter) -> int:
    """Each rank holds the rows of some tokens; a token's row is summed from the one rank that has it. The first one."""
    first, _ = cutter.rows_of(table.weight.shape[0])
    cutter.cut_parameter(table, path, "weight", 0)
    table.look_up = partial(look_up_cut_table, first=first, group=cutter.group, sequence=cutter.sequence)
    return first


def copy_table(table: Embedding, path: str, cutter: Cutter) -> None:
    """Every rank holds the whole table, and looks up its own tokens only if the sequence is cut."""
    cutter.cut_parameter(table, path, "weight", None)
    if cutter.sequence:
        whole_look_up = table.look_up

        def look_up(ids: Tensor, weight: Tensor) -> Tensor:
            return whole_look_up(sequence.cut(ids, cutter.group), weight)

        table.look_up = look_up


# How each layer class is cut. Linear and Embedding are cut by the layer that they are part of, which knows their role.
SPLITS: dict[type[nn.Module], Callable[[Any, str, Cutter], None]] = {
    SelfAttention: _cut_self_attention,
    CrossAttention: _cut_cross_attention,
    FeedForward: _cut_feed_forward,
    LayerNorm: _copy_norm,
    RMSNorm: _copy_norm,
    RelativePositions: _cut_relative_positions,
    Block: _cut_block,
    Decoder: _cut_language_model,
    VisionTransformer: _cut_vision_transformer,
    Bert: _cut_bert,
    Tower: _copy_projection,
    TokenHead: _cut_token_head,
    T5: _cut_t5,
}


def split_tensors(model: nn.Module, group: Group, *, sequence: bool) -> dict[str, Cut]:
    """Cut the model over the group in place; give what this rank holds of each parameter, by name.

    The model may still be on the meta device. Raises TypeError for a parameter of a layer that has no row in SPLITS.
    """
    cutter = Cutter(group, sequence and size_of(group) > 1)
    if cutter.size > 1:
        for path, module in list(model.named_modules()):
            if type(module) in SPLITS:
                SPLITS[type(module)](module, path, cutter)
    for name, parameter in model.named_parameters():
        if cutter.size > 1 and name not in cutter.cuts:
            raise TypeError(f"{name}: its layer's class has no row in parallel.tensor.SPLITS")
        cutter.cuts.setdefault(name, _copy_of(parameter))
    return cutter.cuts

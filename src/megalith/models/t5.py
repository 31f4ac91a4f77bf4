"""T5: an encoder reads a text with gaps, a decoder tells what stood in them.

Shape letters: B batch, E encoder token, T decoder token, P place in the joined stream (E, then T), D width,
V vocabulary.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megalith.layers.embedding import Embedding
from megalith.layers.initial import ZEROS
from megalith.layers.linear import Linear
from megalith.layers.mask import Mask, with_bias
from megalith.layers.random import key
from megalith.layers.relative import RelativePositions
from megalith.models.settings import ModelConfig
from megalith.models.shape import initial_weights, shape_of
from megalith.models.transformer import LanguageModel


def num_layers_of(config: ModelConfig) -> int:
    """Layers of both stacks together, which pipeline stages share out."""
    return 2 * shape_of(config).num_layers


class T5(LanguageModel):
    """An encoder and a decoder that sees it (T5, Raffel et al. 2019, arXiv:1910.10683), as Megatron-LM has it.

    One table serves both and, with a bias, the output. With the options of its settings it is the original: positions
    by distance, one table of them for each stack; norms without a mean; feed-forwards with relu or a gate; no biases;
    unscaled scores; an output with a table of its own, or with features divided by the root of the width.

    layers: numbers of the layers held here, those of the encoder first and those of the decoder behind them. What
    leaves a part of the model is the encoder's and the decoder's stream joined along the tokens: the decoder's waits,
    embedded, while the encoder's layers run, and the encoder's output is handed on through the decoder's.

    Seams for parallelism: those of `LanguageModel`; cut(entry) gives those tokens of one stream that are held here.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        layers: Iterable[int] | None = None,
        first: bool = True,
        last: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, dtype=dtype, first=first, last=last)
        shape = shape_of(config)
        table, _ = initial_weights(config)
        self.relative = config.position_embedding_type == "relative"
        if first or (last and self.tied):
            self.word_embedding = Embedding(vocab_size, shape.width, table, device=device)
        if first and not self.relative:
            self.position_embedding = Embedding(shape.num_positions, shape.width, table, device=device)
        numbers = range(num_layers_of(config)) if layers is None else layers
        depths = [divmod(number, shape.num_layers) for number in numbers]
        in_encoder, in_decoder = ([n for stack, n in depths if stack == wanted] for wanted in (0, 1))
        self.encoder = self.make_blocks(in_encoder, stack="encoder", device=device)
        # The part with the encoder's last layer finishes what the decoder sees.
        if shape.num_layers - 1 in in_encoder:
            self.encoder_norm = self.make_norm(device=device)
        self.decoder = self.make_blocks(in_decoder, stack="decoder", cross=True, device=device)
        if self.relative:
            distances = (config.relative_attention_num_buckets, config.relative_attention_max_distance, shape.num_heads)
            if in_encoder:
                self.encoder_positions = RelativePositions(*distances, table, both_ways=True, device=device)
            if in_decoder:
                self.decoder_positions = RelativePositions(*distances, table, both_ways=False, device=device)
        self.output_bias: nn.Parameter | None = None
        self.initial = {"output_bias": ZEROS}
        if last:
            self.final_norm = self.make_norm(device=device)
            if not self.tied:
                self.output = Linear(shape.width, vocab_size, table, bias=False, device=device)
            if config.output_bias:
                self.output_bias = nn.Parameter(torch.empty(vocab_size, dtype=torch.float32, device=device))

    def forward(
        self,
        tokens_BP: Tensor,
        *,
        padding: Tensor,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        """Logits BTV, or with labels BT the fp32 sum over decoder tokens of loss weight times cross entropy.

        tokens: the encoder's and the decoder's joined. padding: int BE, 1 where the encoder's token is none; nobody
        sees it. The decoder's padding stands at the end, where no token sees it anyway. rows: int32 BP from
        `dropout_rows`; None: no dropout. A part of a model that is not first takes the stream BPD for tokens; one that
        is not last returns it.
        """
        x_BPD = self.stream(tokens_BP, padding, rows)
        if not self.last:
            return x_BPD
        hidden_BTD = self.hidden(x_BPD[:, self.num_held(padding) :])
        if labels is None:
            return self.token_scores(hidden_BTD)
        assert loss_weights is not None, "labels come with loss weights"
        return self.token_loss(hidden_BTD, labels, loss_weights)

    def stream(self, tokens_BP: Tensor, padding_BE: Tensor, rows_BP: Tensor | None) -> Tensor:
        """BPD: what the last blocks held here give, the encoder's stream and the decoder's joined."""
        num_tokens = padding_BE.shape[1]  # of the encoder
        rows_BE, rows_BT = (None, None) if rows_BP is None else (rows_BP[:, :num_tokens], rows_BP[:, num_tokens:])
        if self.first:
            x_BED = self.embed(tokens_BP[:, :num_tokens], rows_BE)
            x_BTD = self.embed(tokens_BP[:, num_tokens:], rows_BT)
        else:
            held = self.num_held(padding_BE)
            x_BED, x_BTD = tokens_BP[:, :held], tokens_BP[:, held:]
        if len(self.encoder):
            x_BED = self.encode(x_BED, padding_BE, rows_BE)
        if len(self.decoder):
            x_BTD = self.decode(x_BTD, x_BED, padding_BE, rows_BT)
        return torch.cat([x_BED, x_BTD], 1)

    def embed(self, tokens_BL: Tensor, rows_BL: Tensor | None) -> Tensor:
        """BLD: the stream that enters the first block of a stack, from its L tokens."""
        x_BLD: Tensor = self.word_embedding(tokens_BL)
        if not self.relative:
            x_BLD = x_BLD + self.position_embedding(self.places(tokens_BL))
        return self.entering(x_BLD, rows_BL, key("dropout", "embedding"))

    def encode(self, x_BED: Tensor, padding_BE: Tensor, rows_BE: Tensor | None) -> Tensor:
        """BED: after the encoder's layers held here; after the last one what the decoder sees."""
        num_tokens = padding_BE.shape[1]
        mask = self.mask_of(padding_BE, num_tokens, rows_BE, dense=self.relative)
        if self.relative:
            mask = with_bias(mask, self.encoder_positions(num_tokens, num_tokens))
        x_BED = self.run_blocks(list(self.encoder.values()), x_BED, mask, rows_BE)
        return self.encoder_norm(x_BED) if hasattr(self, "encoder_norm") else x_BED

    def decode(self, x_BTD: Tensor, memory_BED: Tensor, padding_BE: Tensor, rows_BT: Tensor | None) -> Tensor:
        """BTD: after the decoder's layers held here. memory: the encoder's output."""
        num_queries = x_BTD.shape[1] * padding_BE.shape[1] // memory_BED.shape[1]
        mask = self.mask_for(num_queries, causal=True)
        if self.relative:
            mask = with_bias(mask, self.decoder_positions(num_queries, num_queries))
        return self.run_blocks(
            list(self.decoder.values()),
            x_BTD,
            mask,
            rows_BT,
            memory_BSD=memory_BED.to(self.dtype),
            memory_mask=self.mask_of(padding_BE, num_queries, rows_BT),
        )

    def mask_of(self, padding_BE: Tensor, num_queries: int, rows: Tensor | None, *, dense: bool = False) -> Mask:
        """Every query sees the encoder's tokens that are no padding."""
        return self.mask_for(
            num_queries,
            causal=False,
            query_documents_BT=torch.zeros_like(padding_BE[:, :1]).expand(-1, num_queries),
            key_documents_BS=padding_BE,
            dense=dense or self.drops_scores(rows),
        )

    def num_held(self, padding_BE: Tensor) -> int:
        """The encoder's tokens in the stream that is held here."""
        return (padding_BE if self.cut is None else self.cut(padding_BE)).shape[1]

    def hidden(self, x_BTD: Tensor) -> Tensor:
        """BTD: what is scored, from the stream after the last block."""
        normed_BTD: Tensor = self.final_norm(x_BTD)
        if self.config.scale_decoder_outputs:
            normed_BTD = normed_BTD * normed_BTD.shape[-1] ** -0.5
        return normed_BTD.to(self.dtype)

    @property
    def token_bias(self) -> Tensor | None:
        """V: what is added to the scores of tokens."""
        return self.output_bias

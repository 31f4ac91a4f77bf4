"""What is checked for T5 alone: the two lengths, the spans that are cut out and the tokens that stand for them."""

from collections.abc import Iterator

from megalith.check_bert import masking_faults
from megalith.config import Fault, Run, fault, flag_of
from megalith.data.masking import WORDPIECE
from megalith.data.spans import SPECIAL_TOKENS
from megalith.derived import given_length, tokenizer_type
from megalith.parallel.settings import SPLIT_BACKWARD

WITH_SENTINELS = "HuggingFaceTokenizer"  # a kind whose files may hold them
SHORTEST = SPECIAL_TOKENS + 2  # tokens of the encoder: a sample has two at least


def t5_faults(run: Run) -> Iterator[Fault]:
    """Every fault of a T5's settings."""
    yield from _lengths(run)
    yield from _spans(run)
    yield from _positions(run)
    if not run.data.mock_data:
        yield from _sentinels(run)


def _lengths(run: Run) -> Iterator[Fault]:
    data, parallel = run.data, run.parallel
    decoder = data.decoder_seq_length
    if decoder is None:
        yield fault("decoder_seq_length", None, "is required by t5 and was not given", "Add --decoder-seq-length")
        return
    tensor = parallel.tensor_model_parallel_size
    for name in ("sequence_parallel", "distribute_checkpointed_activations"):
        if getattr(parallel, name) and tensor > 0 and decoder % tensor:
            rule = f"is not divisible by --tensor-model-parallel-size = {tensor}, over which {flag_of(name)} cuts it"
            near = [length for length in (decoder // tensor * tensor, (decoder // tensor + 1) * tensor) if length]
            yield fault("decoder_seq_length", decoder, rule, f"Nearest lengths: {near}; or leave {flag_of(name)} out")


def _spans(run: Run) -> Iterator[Fault]:
    yield from masking_faults(run, special=SPECIAL_TOKENS, shortest=SHORTEST)
    data = run.data
    _, encoder = given_length(run)
    if not 0 < data.mask_prob < 1 or encoder is None or data.decoder_seq_length is None or data.decoder_seq_length < 1:
        return
    masked = max(1, round(data.mask_prob * (encoder - SPECIAL_TOKENS)))
    if data.decoder_seq_length < masked + 2:
        yield fault(
            "decoder_seq_length",
            data.decoder_seq_length,
            f"has no room for the {masked} tokens that --mask-prob = {data.mask_prob} cuts out of {encoder}",
            f"Give at least {masked + 2}, better {2 * masked + 1}, which holds any spans",
        )


def _positions(run: Run) -> Iterator[Fault]:
    model, parallel = run.model, run.parallel
    if model.softmax_scale is not None and not model.softmax_scale > 0:
        yield fault("softmax_scale", model.softmax_scale, "must be above 0", "Give a positive number")
    if model.position_embedding_type != "relative":
        return
    rows, longest = model.relative_attention_num_buckets, model.relative_attention_max_distance
    if rows < 4 or rows % 2:
        rule = "must be even and at least 4: half of the rows are for keys before the query"
        yield fault("relative_attention_num_buckets", rows, rule, "Give such a number, usually 32")
    elif longest <= rows // 2:
        rule = f"must be above half of --relative-attention-num-buckets = {rows}, whose distances have a row each"
        yield fault("relative_attention_max_distance", longest, rule, "Raise it, usually to 128")
    if parallel.pipeline_schedule == SPLIT_BACKWARD:
        rule = "splits the backward pass, and all layers of a stack share one table of distances"
        yield fault("pipeline_schedule", SPLIT_BACKWARD, rule, "Use another schedule, or learned positions")
    stages = parallel.pipeline_model_parallel_size
    if stages > 2 or (stages == 2 and parallel.num_layers_per_virtual_pipeline_stage is not None):
        rule = "cuts a stack of layers, all of which share one table of distances"
        remedy = "Use 2 stages without virtual ones, the encoder and the decoder, or learned positions"
        yield fault("pipeline_model_parallel_size", stages, rule, remedy)


def _sentinels(run: Run) -> Iterator[Fault]:
    kind = tokenizer_type(run)
    if run.data.corpus is None and kind not in (*WORDPIECE, WITH_SENTINELS):
        rule = "has no tokens to stand for spans"
        yield fault("tokenizer_type", kind, rule, f"Use {' or '.join(WORDPIECE)}, or a {WITH_SENTINELS} that has some")
    if run.data.vocab_extra_ids == 0 and kind != WITH_SENTINELS:
        rule = "leaves t5 no token to stand for a span"
        yield fault("vocab_extra_ids", 0, rule, "Give the number of sentinel tokens, usually 100")

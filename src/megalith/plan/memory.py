"""What a GPT's training holds in memory on one rank, from its sizes alone: nothing is built.

Counted tensor by tensor as the eager program keeps them (Korthikanti et al. 2022, arXiv:2205.05198, count theirs the
same way). The compiler may keep less. What is counted is tensors at their peak; the process, the library's workspaces
and an allocator's waste come on top.
"""

from dataclasses import dataclass

import torch

from megalith.layers.attend_blocks import are_faster, scores_of_a_block
from megalith.layers.loss import chunk_rows
from megalith.layers.loss_blocks import BLOCK
from megalith.layers.products import LEAST, leaves_half_to_onednn
from megalith.optim.compact import CHUNK
from megalith.plan.job import (
    FP32,
    Job,
    gathers_again,
    kept_passes,
    layer_matrices,
    layer_parameters,
    parameters_in_products,
    parameters_on_rank,
    table_parameters,
)

# Of an Adam moment, by --optimizer-state-dtype; int8 has 4 bytes of scale for 256 elements.
MOMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / 256}


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that holds most: the first stage for activations, with the tables of either end."""

    weights: float
    gradients: float  # at the peak
    optimizer: float
    activations: float  # kept for backward passes, of all microbatches in flight
    working: float  # the loss, or the layer that is being differentiated

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.states + self.activations + self.working


def predict(job: Job) -> Memory:
    """The peak of a step that is not the first, on the stage that holds most."""
    stages = {0, job.pipeline - 1}
    return max((predict_stage(job, stage) for stage in stages), key=lambda memory: memory.total)


def predict_stage(job: Job, stage: int) -> Memory:
    """The peak of a step on a stage: when the loss is computed, when the last layer is differentiated, or when the
    gradients of the table come together."""
    is_first, is_last = stage == 0, stage == job.pipeline - 1
    parameters = parameters_on_rank(job)
    shared = job.sharers if job.shares_weights else 1
    weights = FP32 * parameters / shared + gathered_bytes(job)
    gradients = FP32 * parameters / shared
    if shared > 1 and job.pipeline > 1:
        gradients += FP32 * parameters  # summed over the step's microbatches before they are shared out
    moments_by = job.replicas if job.sharding == "optimizer" else shared
    moments = (2 * MOMENT_BYTES[job.moments] if job.optimizer == "adam" else FP32) * parameters / moments_by
    kept = kept_passes(job, stage) * stage_activations(job) + received_bytes(job, is_first, is_last)
    kept += delayed_bytes(job)
    if is_last and job.schedule == "gpipe":
        # Of all microbatches but the one whose loss is computed, what that leaves for the backward pass.
        kept += (kept_passes(job, stage) - 1) * loss_gradients(job)
    narrow = job.layers_of_a_stage * copy_bytes(job) if is_rounded_once(job) else 0.0
    kept += narrow
    # In the first microbatch of a step the gradients come into being while the activations go.
    before = gradients if job.num_microbatches > 1 and job.schedule != "gpipe" else 0.0
    # By the time of the last layer the last norm is done with.
    at_layer = kept - (end_bytes(job) if is_last else 0.0) + recomputed_activations(job)
    # In the only microbatch of a step the gradients are there by the time of the first layer, but for its own.
    done = gradients - FP32 * (parameters_on_rank(job) - (job.layers_of_a_stage - 1) * layer_parameters(job)) / shared
    at_first = job.stream + (layer_activations(job) if job.recompute != "full" else recomputed_activations(job))
    moments_of_a_step = [
        Memory(weights, before, moments, kept, loss_bytes(job) if is_last else 0.0),
        Memory(weights, before, moments, at_layer, layer_working(job, with_table=is_first and is_last)),
        Memory(weights, max(before, done), moments, narrow + at_first, layer_working(job, with_table=is_first)),
        Memory(weights, gradients, moments, narrow, look_up_bytes(job) if is_first else 0.0),
        Memory(weights, gradients, moments, 0.0, max(travelling_bytes(job), update_bytes(job))),
    ]
    return max(moments_of_a_step, key=lambda memory: memory.total)


def received_bytes(job: Job, is_first: bool, is_last: bool) -> float:
    """What a stage receives: torch's pipelines have a place for each microbatch of a step, for what enters a part and
    for the gradient of what leaves it."""
    return job.num_microbatches * job.stream * (2 * job.parts - is_first - is_last)


def travelling_bytes(job: Job) -> float:
    """Copies of all gradients, which are in buckets until replicas have summed them."""
    travel = job.replicas > 1 and job.sharding in ("none", "optimizer")
    return FP32 * parameters_on_rank(job) if travel else 0.0


def delayed_bytes(job: Job) -> float:
    """What a zero-bubble schedule keeps besides, of parts whose gradients of weights are still to be made: what
    entered their products, and the gradients of what left them."""
    if job.schedule != "zero-bubble":
        return 0.0
    heads, inner = job.query_features, job.inner / job.tensor
    entered = job.width * 2 + heads + inner
    left = heads + 2 * job.key_features + job.width * 2 + (2 if job.is_gated else 1) * inner
    layers = job.layers_of_a_stage / job.parts
    parts = job.pipeline + (1 if job.parts > 1 else 0)  # as many as were counted on ranks that hold most
    return parts * layers * job.tokens * (entered + left) * job.compute_bytes


def gathered_bytes(job: Job) -> float:
    """Whole weights beside a rank's shard of them: of all blocks, or of the one that is used and the one that is next;
    those in blocks are gathered in the type of the computation, the tables in fp32."""
    if not job.shares_weights:
        return 0.0
    layers = job.layers_of_a_stage
    blocks = layers * layer_parameters(job)
    tables = parameters_on_rank(job) - blocks
    # Stages keep what they gathered until the step's last pass.
    at_once = layers if job.sharding == "gradients" or job.pipeline > 1 else min(2, layers)
    return FP32 * tables + at_once * layer_parameters(job) * job.compute_bytes


def layer_activations(job: Job) -> float:
    """What one layer keeps of a microbatch: inputs of its norms and products, queries, keys, values, and what is inside
    the feed-forward.

    Where products go to oneDNN the outputs of norms are made again.
    """
    tokens, e = job.tokens, job.compute_bytes
    heads, inner = job.query_features, job.inner / job.tensor
    attended = attended_features(job)
    between = 2 * job.stream_bytes * job.width / job.cut  # before each norm
    entering: float = 2 * job.width + heads + inner  # the four products
    # Inside a feed-forward besides what enters the last product; that is what relu itself keeps.
    inside = 3 if job.is_gated else 1
    if job.fp8:
        # Products keep what entered them in 8 bits; compiled ones make that again of what others keep.
        if job.cut > 1:
            entering += 2 * job.width * (e / job.cut - 1)  # in its own type what comes from other ranks again
        coming_out = 0.0 if attends_in_blocks(job) else heads
        kept = e * (attended + coming_out + inside * inner) + (0.0 if job.compiled else entering)
        copies = 0.0 if job.compiled or is_rounded_once(job) else parameters_in_products(job)
    else:
        # Of a cut sequence its part is kept, or the whole as it was gathered.
        normed: float = job.width * (_is_kept(job, heads + 2 * job.key_features) + _is_kept(job, inner))
        normed /= job.cut if gathers_again(job) else 1
        kept = e * (normed + attended + heads + (inside + (job.activation != "relu")) * inner)
        copies = 0.0 if is_rounded_once(job) or job.shares_weights else copy_bytes(job)
    masks = (2 * job.width / job.cut) if job.dropout else 0.0
    normed_heads = (job.query_features + job.key_features) / job.head_width if job.norms_of_heads else 0.0
    sums = 0.0 if attends_in_blocks(job) else job.num_heads / job.tensor  # of the powers of scores
    statistics = FP32 * (job.parameters_of_feature * (2 / job.cut + normed_heads) + sums)
    words = FP32 * (job.num_heads / job.tensor + 1) if job.attention_dropout else 0.0
    return tokens * (between + kept + masks + statistics + words) + copies + context_activations(job)


def attended_features(job: Job) -> float:
    """What a layer keeps of a token's queries, keys and values; of those that are gathered: `context_activations`."""
    # What norms of heads are of is the product's output, which stays.
    product = job.query_features + 2 * job.key_features if job.norms_of_heads else 0.0
    if job.keeps_gathered_keys:
        # What turns with its place is made anew; else the queries are a part of the product's output, which stays.
        return job.query_features + (product or (0.0 if job.rotary else 2 * job.key_features))
    # As attention takes them: repeated for each head with dropout, and in fp32 on a GPU.
    is_in_fp32 = job.device == "cuda" and job.compute_bytes == FP32
    are_repeated = (job.attention_dropout or is_in_fp32) and job.recompute != "selective"
    keys = job.query_features if are_repeated else job.key_features
    # Values are taken from the product where they lie, unless they are repeated or traded.
    are_copied = keys > job.key_features or (job.context > 1 and job.recompute != "selective")
    values = keys if are_copied or not product else 0.0
    return product + job.query_features + keys + values


def context_activations(job: Job) -> float:
    """What attention over context ranks keeps of a layer besides. Of gathered keys: those and the values of all ranks,
    what comes out a chunk at a time, and the masks of its two chunks where no kernel does without
    (megalith.layers.attend). Of traded heads: what comes out, before it is traded back. Blocks keep neither of what
    comes out nor masks."""
    if job.context == 1 or job.recompute == "selective":
        return 0.0
    in_blocks = attends_in_blocks(job)
    coming_out = 0.0 if in_blocks else job.query_features
    if job.context_exchange == "all-to-all":
        return job.compute_bytes * job.tokens * (coming_out + _kept_as_traded(job))
    heads, chunk = job.query_features, job.sequence_length / (2 * job.context)
    # A rank's two chunks of queries see one chunk more than there are. Each keeps what it repeats of the keys it sees.
    are_repeated = job.key_features < heads and (job.attention_dropout or job.device == "cuda")
    keys = heads * (2 * job.context + 1) if are_repeated else job.key_features * 2 * job.context
    is_written = (job.device == "cpu" or job.compute_bytes == FP32) and not job.attention_dropout and not in_blocks
    pairs = chunk**2 * (2 * job.context + 1) if is_written else 0.0
    return job.compute_bytes * (job.tokens * (keys + coming_out) + pairs)


def attends_in_blocks(job: Job) -> bool:
    """Whether attention is computed a block of queries at a time, as `megalith.layers.attend` decides."""
    if job.device != "cpu" or job.attention_dropout:
        return job.device == "cpu"
    if job.compiled:
        return False
    heads, queries = heads_and_queries(job)
    return are_faster(_dtype(job), heads=heads, queries=queries, keys=job.sequence_length, width=job.head_width)


def _dtype(job: Job) -> torch.dtype:
    """Of an activation."""
    if job.compute_bytes == FP32:
        return torch.float32
    return torch.bfloat16 if job.bf16 else torch.float16


def heads_and_queries(job: Job) -> tuple[float, float]:
    """Of one attention on a rank: heads of all samples, and queries of a head."""
    heads = job.micro_batch_size * job.num_heads / job.tensor
    if job.context == 1:
        return heads, job.sequence_length
    if job.context_exchange == "all-to-all":
        return heads / job.context, job.sequence_length
    return heads, job.sequence_length / (2 * job.context)


def _kept_as_traded(job: Job) -> float:
    """Of a token whose heads are traded, what stays beside the queries, keys and values as attention takes them: these
    come as one, of which none goes as long as one of them is used."""
    if job.key_features == job.query_features:
        return 0.0
    # The queries are copied out of several heads of keys, of one not; with dropout keys and values are repeated.
    are_copied = job.key_features > job.head_width * job.context
    if job.attention_dropout:
        return 0.0 if are_copied else 2 * job.key_features
    return job.query_features if are_copied else 0.0


def copy_bytes(job: Job) -> float:
    """A layer's matrices in 16 bits, as its backward pass needs them; in 8 bits as both passes do."""
    return 2.0 * parameters_in_products(job) if job.compute_bytes < FP32 else 0.0


def is_rounded_once(job: Job) -> bool:
    """Whether a step has its weights in 16 bits from its start to its end, instead of a copy with each microbatch
    (parallel/narrow.py). Weights that are gathered come in 16 bits."""
    return _knows_its_weights(job) and job.recompute != "full"


def adds_in_products(job: Job) -> bool:
    """Whether a microbatch's gradients of matrices are nowhere but in the sum of all (layers/accumulate.py)."""
    return _knows_its_weights(job) and job.compute_bytes < FP32 and not job.fp8


def _knows_its_weights(job: Job) -> bool:
    """Whether products on a GPU meet whole parameters, in backward passes that are not taken in two parts."""
    return job.device == "cuda" and not job.shares_weights and job.schedule != "zero-bubble"


def _is_kept(job: Job, features: float) -> bool:
    """Whether a norm's output is kept for the backward pass of the product that makes so many features of it."""
    is_followed = job.device == "cpu" and job.compute_bytes == FP32
    if job.tensor > 1:
        return not (is_followed and gathers_again(job))
    return not (is_followed and job.tokens * job.width * features >= LEAST)


def end_bytes(job: Job) -> float:
    """The stream that leaves the last layer, and its norm."""
    normed = job.tokens * job.width * job.compute_bytes / job.cut
    return job.stream + normed


def stage_activations(job: Job) -> float:
    """What a stage keeps of one microbatch, what leaves each of its parts included, and the angles that all layers of a
    part share."""
    layers = job.layers_of_a_stage
    ends = job.parts * (end_bytes(job) + FP32 * job.tokens * job.rotary)
    if job.recompute != "full":
        return layers * layer_activations(job) + ends
    chunks = job.parts * -(-layers // (job.parts * job.recompute_every))
    return chunks * job.stream / (job.tensor if job.cuts_kept else 1) + ends


def recomputed_activations(job: Job) -> float:
    """What is there again of the layers that are being differentiated, beside their input."""
    if job.recompute != "full":
        return 0.0
    whole = min(job.recompute_every, job.layers_of_a_stage) * layer_activations(job)
    return whole if job.cuts_kept else whole - job.stream


def layer_working(job: Job, *, with_table: bool) -> float:
    """What the backward pass of the last layer makes: gradients of the stream, of the feed-forward's inside and of its
    matrix; with_table: and the table's gradient of the loss, which waits for that of looking up where it is tied."""
    tokens, e = job.tokens, job.compute_bytes
    inner = job.inner / job.tensor
    waiting = FP32 * job.vocab_size / job.tensor * job.width if with_table and job.tied else 0.0
    matrix = 0.0 if job.num_microbatches > 1 and adds_in_products(job) else FP32 * job.width * inner
    feed_forward = tokens * e * (inner + job.width) + matrix
    return max(feed_forward, _blocks_working(job)) + waiting


def _blocks_working(job: Job) -> float:
    """What the backward pass of attention in blocks has, less what the feed-forward kept, which is gone by then."""
    if not attends_in_blocks(job):
        return 0.0
    tokens, e = job.tokens, job.compute_bytes
    heads, queries = heads_and_queries(job)
    features = job.query_features if job.attention_dropout else job.key_features  # repeated with dropout
    keys = 2 * features * (job.context if job.context_exchange == "gather" else 1)
    # Gradients of what comes out, of queries, keys and values, sums of the last two, and copies of them.
    gradients = tokens * (e * (job.width + 2 * job.query_features + 2 * keys) + FP32 * keys)
    # Probabilities and two gradients; with dropout probabilities, a gradient, and the words that its mask is made of.
    of_score = 2 * e + 2 * FP32 if job.attention_dropout else 3 * e
    most = scores_of_a_block(_dtype(job), heads=heads, queries=queries, keys=job.sequence_length)
    inside = (3 if job.is_gated else 1) + (job.activation != "relu")
    return gradients + of_score * most - tokens * e * inside * job.inner / job.tensor


def look_up_bytes(job: Job) -> float:
    """What the last operation of a backward pass makes beside the gradients: the table's of looking up, as large as it.

    Where the table is tied, that of the loss has waited for it, and both are added up, on a CPU in place where no other
    rank holds a part; in the first microbatch of a step the last tensor of these is the gradient itself.
    """
    in_place = job.device == "cpu" and job.tensor == 1
    tables = (3 if job.tied and job.pipeline == 1 and not in_place else 1) - (1 if job.num_microbatches == 1 else 0)
    return tables * FP32 * job.vocab_size / job.tensor * job.width


def loss_bytes(job: Job) -> float:
    """A chunk of logits, the gradient by the hidden states, and that of the table."""
    tokens, vocabulary = job.tokens, job.vocab_size / job.tensor
    rows = min(chunk_rows(job.device, int(tokens)), tokens)
    by_blocks = job.device == "cpu" and vocabulary > BLOCK and rows * job.width * BLOCK >= LEAST and job.tensor == 1
    if job.bf16 and by_blocks:
        # The probabilities of a chunk, the logits of the last block in fp32 or of the one before, the table in bf16.
        last, e = vocabulary % BLOCK, job.compute_bytes
        block = max(FP32 * last, FP32 * BLOCK - e * last)
        copies = 1.0 + block / (e * vocabulary) + job.width / rows
    elif job.compute_bytes == FP32:
        # Beside the probabilities rows of labels and products, and a part of the table's gradient before it is added.
        beside = 4 * rows * job.width if by_blocks else 0.0
        if job.device == "cpu" and leaves_half_to_onednn():
            beside += min(BLOCK, vocabulary) * job.width
            if job.tensor > 1 and vocabulary > BLOCK:
                # Before that the probabilities of as many entries, turned around, and the part before it.
                beside += BLOCK * (rows + job.width)
        copies = 1.0 + beside / (rows * vocabulary)
    elif job.device == "cpu" and job.tensor > 1:
        # Beside the logits, which become the slopes, all of it in fp32, and the table in 16 bits.
        copies = 1.0 + FP32 / job.compute_bytes + job.width / rows
    elif job.device == "cpu":
        # The logarithms in fp32 are made of a copy in fp32, and the table lies there in 16 bits.
        copies = 1.0 + 2 * FP32 / job.compute_bytes + job.width / rows
    else:
        # The slopes take the logits' place; beside them the table in 16 bits.
        copies = 1.0 + job.width / rows
    chunk = rows * vocabulary * job.compute_bytes * copies
    return chunk + loss_gradients(job)


def loss_gradients(job: Job) -> float:
    """What a loss leaves for its backward pass: the gradients by the hidden states and of the table."""
    table = FP32 * job.vocab_size / job.tensor * job.width
    return job.tokens * job.width * job.compute_bytes + table


def update_bytes(job: Job) -> float:
    """What the optimizer makes of a stretch of weights whose moments are not in fp32, where no kernel does it in one
    pass: moments, gradients, random bits and, of codes, what they are on either side, in 32 bits each."""
    if job.moments == "fp32" or job.device != "cpu":
        return 0.0
    largest = max(table_parameters(job), *(entering * leaving for entering, leaving in layer_matrices(job)))
    tensors = 6 if job.moments == "bf16" else 10
    return FP32 * (tensors * min(CHUNK["cpu"], largest) + CHUNK["cpu"])

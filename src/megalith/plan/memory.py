"""What a GPT's training holds in memory on one rank, from its sizes alone: nothing is built.

Counted tensor by tensor as the eager program keeps them (Korthikanti et al. 2022, arXiv:2205.05198, count theirs the
same way). The compiler may keep less. What is counted is tensors at their peak; the process, the library's workspaces
and an allocator's waste come on top.
"""

from dataclasses import dataclass

from megalith.layers.loss import CHUNK_ROWS
from megalith.layers.loss_blocks import BLOCK
from megalith.layers.products import LEAST

FP32 = 4  # bytes
# Of an Adam moment, by --optimizer-state-dtype; int8 has 4 bytes of scale for 256 elements.
MOMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / 256}


@dataclass(frozen=True)
class Job:
    """A GPT, how it is trained, and how it is laid over ranks."""

    num_layers: int
    width: int
    num_heads: int
    head_width: int
    inner: int
    vocab_size: int  # padded
    num_positions: int
    sequence_length: int
    micro_batch_size: int
    num_microbatches: int  # of a step, on a rank
    compute_bytes: int = FP32  # of an activation
    stream_bytes: int = FP32  # of an element between blocks
    bf16: bool = False  # of the 16-bit types
    dropout: bool = False  # of what is added to the stream
    attention_dropout: bool = False
    recompute: str | None = None  # full, selective or None
    recompute_every: int = 1
    optimizer: str = "adam"
    moments: str = "fp32"
    tied: bool = True
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sharding: str = "none"  # optimizer, gradients or parameters
    shard_size: int | None = None  # ranks that share gradients or parameters out; None: all replicas
    device: str = "cpu"


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
    """The peak of a step that is not the first: when the loss is computed, when the last layer is differentiated, or
    when the gradients of the table come together."""
    parameters = parameters_on_rank(job)
    replicas = job.data * job.context
    shared = replicas if job.shard_size is None else job.shard_size
    weights = FP32 * parameters / (shared if job.sharding in ("gradients", "parameters") else 1) + gathered_bytes(job)
    gradients = FP32 * parameters / (shared if job.sharding in ("gradients", "parameters") else 1)
    moments_by = {"none": 1, "optimizer": replicas}.get(job.sharding, shared)
    moments = (2 * MOMENT_BYTES[job.moments] if job.optimizer == "adam" else FP32) * parameters / moments_by
    layers = -(-job.num_layers // job.pipeline)
    in_flight = min(job.pipeline, job.num_microbatches)
    kept = in_flight * stage_activations(job, layers)
    # In the first microbatch of a step the gradients come into being while the activations go.
    before = gradients if job.num_microbatches > 1 else 0.0
    moments_of_a_step = [
        Memory(weights, before, moments, kept, loss_bytes(job) if job.pipeline == 1 else 0.0),
        # By then the last norm is done with.
        Memory(
            weights, before, moments, kept - end_bytes(job) + recomputed_activations(job, layers), layer_working(job)
        ),
        Memory(weights, gradients, moments, 0.0, look_up_bytes(job)),
    ]
    return max(moments_of_a_step, key=lambda memory: memory.total)


def gathered_bytes(job: Job) -> float:
    """Whole weights beside a rank's shard of them: of all blocks, or of the one that is used and the one that is next;
    those in blocks are gathered in the type of the computation, the tables in fp32."""
    if job.sharding not in ("gradients", "parameters"):
        return 0.0
    layers = -(-job.num_layers // job.pipeline)
    blocks = layers * layer_parameters(job)
    tables = parameters_on_rank(job) - blocks
    at_once = layers if job.sharding == "gradients" else min(2, layers)
    return FP32 * tables + at_once * layer_parameters(job) * job.compute_bytes


def layer_parameters(job: Job) -> float:
    """Elements of the weights of one layer on a rank."""
    biases_of_cut_products = (3 * job.num_heads * job.head_width + job.inner) / job.tensor
    return parameters_in_products(job) + biases_of_cut_products + 2 * job.width + 4 * job.width


def parameters_on_rank(job: Job) -> float:
    """Elements of the weights that a rank uses, before replicas share anything out."""
    width = job.width
    tables = job.vocab_size * width / job.tensor * (1 if job.tied or job.pipeline > 1 else 2)
    layers = -(-job.num_layers // job.pipeline)
    return layers * layer_parameters(job) + tables + job.num_positions * width + 2 * width


def tokens_on_rank(job: Job) -> float:
    """Tokens of a microbatch whose attention and feed-forward are computed here."""
    return job.micro_batch_size * job.sequence_length / job.context


def layer_activations(job: Job) -> float:
    """What one layer keeps of a microbatch: inputs of its norms and products, queries, keys, values, two of GELU.

    Where products go to oneDNN the outputs of norms are made again.
    """
    tokens, e = tokens_on_rank(job), job.compute_bytes
    cut = job.tensor if job.sequence_parallel else 1
    heads, inner = job.num_heads * job.head_width / job.tensor, job.inner / job.tensor
    between = 2 * job.stream_bytes * job.width / cut  # before each norm
    normed = e * job.width / cut * (_is_kept(job, 3 * heads) + _is_kept(job, inner))
    masks = (2 * job.width / cut) if job.dropout else 0.0
    inside = e * (3 * heads + heads + 2 * inner)
    statistics = FP32 * (4 / cut + job.num_heads / job.tensor)
    words = FP32 * (job.num_heads / job.tensor + 1) if job.attention_dropout else 0.0
    copies = 2.0 * parameters_in_products(job) if e < FP32 else 0.0
    return tokens * (between + normed + masks + inside + statistics + words) + copies


def _is_kept(job: Job, features: float) -> bool:
    """Whether a norm's output is kept for the backward pass of the product that makes so many features of it."""
    by_onednn = job.device == "cpu" and job.compute_bytes == FP32
    large = tokens_on_rank(job) * job.width * features >= LEAST
    return not (by_onednn and large) or job.tensor > 1


def parameters_in_products(job: Job) -> float:
    """Elements of a layer's matrices here, of which 16-bit products keep a copy for the backward pass."""
    return (4 * job.width * job.num_heads * job.head_width + 2 * job.width * job.inner) / job.tensor


def stream_bytes(job: Job) -> float:
    """The stream of a microbatch between two layers."""
    return tokens_on_rank(job) * job.width * job.stream_bytes / (job.tensor if job.sequence_parallel else 1)


def end_bytes(job: Job) -> float:
    """The stream that leaves the last layer, and its norm."""
    normed = tokens_on_rank(job) * job.width * job.compute_bytes / (job.tensor if job.sequence_parallel else 1)
    return stream_bytes(job) + normed


def stage_activations(job: Job, layers: int) -> float:
    """What a stage of that many layers keeps of one microbatch, what leaves it included."""
    if job.recompute != "full":
        return layers * layer_activations(job) + end_bytes(job)
    return -(-layers // min(job.recompute_every, layers)) * stream_bytes(job) + end_bytes(job)


def recomputed_activations(job: Job, layers: int) -> float:
    """What is there again of the layers that are being differentiated, beside their input."""
    if job.recompute != "full":
        return 0.0
    return min(job.recompute_every, layers) * layer_activations(job) - stream_bytes(job)


def layer_working(job: Job) -> float:
    """What the backward pass of the last layer makes: gradients of the stream, of the feed-forward's inside and of its
    matrix; and the table's gradient of the loss, which waits for that of looking up where the table is tied."""
    tokens, e = tokens_on_rank(job), job.compute_bytes
    inner = job.inner / job.tensor
    waiting = FP32 * job.vocab_size / job.tensor * job.width if job.pipeline == 1 and job.tied else 0.0
    return tokens * e * (inner + job.width) + FP32 * job.width * inner + waiting


def look_up_bytes(job: Job) -> float:
    """What the last operation of a backward pass makes beside the gradients: the table's of looking up, as large as it.

    Where the table is tied, that of the loss has waited for it, and both are added up, on a CPU in place where no other
    rank holds a part; in the first microbatch of a step the last tensor of these is the gradient itself.
    """
    if job.pipeline > 1:
        return 0.0
    in_place = job.device == "cpu" and job.tensor == 1
    tables = (3 if job.tied and not in_place else 1) - (1 if job.num_microbatches == 1 else 0)
    return tables * FP32 * job.vocab_size / job.tensor * job.width


def loss_bytes(job: Job) -> float:
    """A chunk of logits, the gradient by the hidden states, and that of the table."""
    tokens, vocabulary = tokens_on_rank(job), job.vocab_size / job.tensor
    rows = min(CHUNK_ROWS[job.device], tokens)
    if job.bf16 and job.device == "cpu" and vocabulary > BLOCK and rows * job.width * BLOCK >= LEAST:
        # The probabilities of a chunk, the logits of the last block in fp32 or of the one before, the table in bf16.
        last, e = vocabulary % BLOCK, job.compute_bytes
        block = max(FP32 * last, FP32 * BLOCK - e * last)
        copies = 1.0 + block / (e * vocabulary) + job.width / rows
    else:
        # In 16 bits the slopes are another chunk; on the CPU, where nothing is fused, so are the logarithms, in fp32.
        copies = 1.0 if job.compute_bytes == FP32 and job.device == "cpu" else 2.0
        if job.compute_bytes < FP32 and job.device == "cpu":
            copies += 1.5 * FP32 / job.compute_bytes
    chunk = rows * vocabulary * job.compute_bytes * copies
    return chunk + tokens * job.width * job.compute_bytes + FP32 * vocabulary * job.width

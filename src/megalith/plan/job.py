"""A GPT, how it is trained and how it is laid over ranks, in numbers: what the forecasts are made from."""

from dataclasses import dataclass

from megalith.layers.feedforward import GATED

FP32 = 4  # bytes


@dataclass(frozen=True)
class Job:
    """A GPT, how it is trained, and how it is laid over ranks."""

    num_layers: int
    width: int
    num_heads: int
    head_width: int
    inner: int
    vocab_size: int  # padded
    num_positions: int  # rows of a table of positions
    sequence_length: int
    micro_batch_size: int
    num_microbatches: int  # of a step, on a rank
    compute_bytes: int = FP32  # of an activation
    stream_bytes: int = FP32  # of an element between blocks
    bf16: bool = False  # of the 16-bit types
    fp8: bool = False  # products of blocks in 8 bits
    dropout: bool = False  # of what is added to the stream
    attention_dropout: bool = False
    recompute: str | None = None  # full, selective or None
    recompute_every: int = 1
    cuts_kept: bool = False  # tensor ranks share out the streams that full recomputation keeps
    optimizer: str = "adam"
    moments: str = "fp32"
    tied: bool = True
    biases: bool = True  # of a layer's products
    qkv_biases: bool = True  # of the one to queries, keys and values
    norms_of_heads: bool = False  # of their queries and keys
    activation: str = "gelu"  # gelu, relu, gated-gelu or swiglu
    normalization: str = "LayerNorm"
    num_groups: int | None = None  # heads of keys and values; None: each head has its own
    rotary: int = 0  # features of a head that turn with its place
    compiled: bool = False
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    parts: int = 1  # of the model, on a stage's rank
    schedule: str = "1f1b"  # of the pipeline: gpipe, 1f1b, interleaved or zero-bubble
    context: int = 1
    context_exchange: str = "gather"
    data: int = 1
    sharding: str = "none"  # optimizer, gradients or parameters
    shard_size: int | None = None  # ranks that share gradients or parameters out; None: all replicas
    device: str = "cpu"

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, or share them out."""
        return self.data * self.context

    @property
    def shares_weights(self) -> bool:
        """Whether ranks hold shards of the weights, and gather them (FSDP2)."""
        return self.sharding in ("gradients", "parameters")

    @property
    def sharers(self) -> int:
        """Ranks over which gradients or parameters are shared out."""
        return self.replicas if self.shard_size is None else self.shard_size

    @property
    def layers_of_a_stage(self) -> int:
        return -(-self.num_layers // self.pipeline)

    @property
    def tokens(self) -> float:
        """Of a microbatch, those whose attention and feed-forward are computed on a rank."""
        return self.micro_batch_size * self.sequence_length / self.context

    @property
    def is_gated(self) -> bool:
        """Whether a feed-forward has three matrices."""
        return self.activation in GATED

    @property
    def query_features(self) -> float:
        """Of a token, on a rank; what attention gives are as many."""
        return self.num_heads * self.head_width / self.tensor

    @property
    def key_features(self) -> float:
        """Of a token, on a rank; values have as many."""
        return (self.num_groups or self.num_heads) * self.head_width / self.tensor

    @property
    def keeps_gathered_keys(self) -> bool:
        """Whether a layer keeps the keys and values of all context ranks until its backward pass."""
        return self.context > 1 and self.context_exchange == "gather" and self.recompute != "selective"

    @property
    def norm_parameters(self) -> int:
        """Elements of a norm's weights."""
        return self.parameters_of_feature * self.width

    @property
    def head_norm_parameters(self) -> int:
        """Elements of the weights of a layer's norms of queries and keys, which its heads share."""
        return 2 * self.parameters_of_feature * self.head_width if self.norms_of_heads else 0

    @property
    def parameters_of_feature(self) -> int:
        """Of a norm; numbers that it keeps of what it norms are as many."""
        return 1 if self.normalization == "RMSNorm" else 2

    @property
    def cut(self) -> int:
        """Ways in which the stream between blocks is cut along its tokens."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def stream(self) -> float:
        """Bytes of the stream of a microbatch between two layers."""
        return self.tokens * self.width * self.stream_bytes / self.cut


def layer_matrices(job: Job) -> list[tuple[float, float]]:
    """(features in, features out) of the products of a layer on a rank, four or with a gate five."""
    heads, inner = job.query_features, job.inner / job.tensor
    entering = [(job.width, inner)] * (2 if job.is_gated else 1)
    return [(job.width, heads + 2 * job.key_features), (heads, job.width), *entering, (inner, job.width)]


def gathers_again(job: Job) -> bool:
    """Whether products that tensor ranks share out meet what enters them once more in their backward passes
    (layers/entering.py)."""
    return job.tensor > 1 and job.schedule != "zero-bubble"


def parameters_in_products(job: Job) -> float:
    """Elements of a layer's matrices on a rank."""
    return sum(entering * leaving for entering, leaving in layer_matrices(job))


def layer_parameters(job: Job) -> float:
    """Elements of the weights of one layer on a rank."""
    qkv, *others = (leaving for _, leaving in layer_matrices(job))
    biases = qkv * job.qkv_biases + sum(others) * job.biases
    return parameters_in_products(job) + biases + 2 * job.norm_parameters + job.head_norm_parameters


def table_parameters(job: Job) -> float:
    """Elements of a rank's part of the table of words."""
    return job.vocab_size * job.width / job.tensor


def parameters_on_rank(job: Job) -> float:
    """Elements of the weights that a rank uses, before replicas share anything out."""
    tables = table_parameters(job) * (1 if job.tied or job.pipeline > 1 else 2)
    ends = tables + job.num_positions * job.width + job.norm_parameters
    return job.layers_of_a_stage * layer_parameters(job) + ends


def kept_passes(job: Job, stage: int) -> float:
    """Microbatches whose activations a stage keeps at once, a microbatch being one through all of its parts.

    A stage has so many forward passes of a part before its first backward pass, and one more
    (torch.distributed.pipelining's schedules, which take Megatron-LM's: Narayanan et al. 2021, arXiv:2104.04473).
    """
    after = job.pipeline - 1 - stage
    if job.schedule == "gpipe":
        return job.num_microbatches
    if job.schedule == "1f1b":
        return min(after + 1, job.num_microbatches)
    before = (job.parts - 1) * job.pipeline + (2 if job.schedule == "interleaved" else 1) * after
    return min(before + 1, job.num_microbatches * job.parts) / job.parts

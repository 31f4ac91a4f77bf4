"""What the ranks of a GPT's job send each other in a step, from its sizes alone.

`python -m benchmarks.traffic` holds these figures against the bytes that collectives of real steps move.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megalith.plan.job import FP32, Job, gathers_again, layer_parameters, parameters_on_rank, table_parameters

# Bytes that a rank sends in a collective of n ranks, over those of its whole tensor.
SHARES: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
}


@dataclass(frozen=True)
class Transfer:
    """A collective that each rank of a group calls, so many times in a step."""

    collective: str
    purpose: str  # tensor, context, pipeline, tables, replicas or copies
    size: float  # bytes of the whole tensor: what an all-gather gives, what a reduce-scatter takes
    calls: float
    ranks: int
    stride: int  # from a rank of the group to the next
    is_beside: bool = False  # on its way while products are computed that do not need it

    @property
    def total(self) -> float:
        """Bytes of the whole tensors of a step."""
        return self.size * self.calls

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in one call."""
        return self.size * SHARES[self.collective](self.ranks)


def transfers(job: Job) -> list[Transfer]:
    """What ranks take part in; each is that of the rank which moves most by it."""
    return [*_tensor(job), *_context(job), *_pipeline(job), *_replicas(job)]


def _tensor(job: Job) -> Iterator[Transfer]:
    if job.tensor == 1:
        return
    stream, embedded = job.stream * job.cut, job.tokens * job.width * FP32
    # Two products in a block, each with a collective forward and one back; the loss's backward. Embeddings are fp32.
    # The sums back, and what is gathered for them once more, are beside products, but where backward passes are split.
    products = job.num_microbatches * 2 * job.layers_of_a_stage
    beside = products if gathers_again(job) else 0
    calls = 2 * products + (job.num_microbatches if job.pipeline == 1 else 0)
    again = products if job.recompute == "full" else 0
    # Computing again ends before the last sum over ranks, unless dropout keeps something after it.
    chunks = -(-job.layers_of_a_stage // job.recompute_every)
    left_out = job.num_microbatches * chunks if job.recompute == "full" and not job.dropout else 0
    if job.sequence_parallel:
        yield Transfer("all-gather", "tensor", stream, calls + again, job.tensor, 1)
        yield Transfer("all-gather", "tensor", stream, beside, job.tensor, 1, is_beside=True)
        yield Transfer("all-gather", "tensor", embedded, job.num_microbatches, job.tensor, 1)
    if job.cuts_kept and job.recompute == "full":
        # Kept streams come together to be computed with, then again, and so do their gradients.
        yield Transfer("all-gather", "tensor", stream, 3 * job.num_microbatches * chunks, job.tensor, 1)
    sums = "reduce-scatter" if job.sequence_parallel else "all-reduce"
    yield Transfer(sums, "tensor", stream, calls + again - left_out - beside, job.tensor, 1)
    yield Transfer(sums, "tensor", stream, beside, job.tensor, 1, is_beside=True)
    yield Transfer(sums, "tensor", embedded, job.num_microbatches, job.tensor, 1)
    if held := _held_alike(job):
        yield Transfer("all-reduce", "tensor", FP32 * held / _sharers_of_sums(job), 1, job.tensor, 1)
    # Largest logit, sum of powers and the label's logit of every token.
    yield Transfer("all-reduce", "tensor", job.tokens * FP32, 3 * job.num_microbatches, job.tensor, 1)


def _sharers_of_sums(job: Job) -> int:
    """Ranks that share out the gradients that replicas have summed."""
    if job.sharding == "optimizer":
        return job.replicas
    return job.sharers if job.shares_weights else 1


def _held_alike(job: Job) -> float:
    """Elements of a stage's weights that its tensor ranks all hold, each with a part of the gradient: norms of heads,
    and with a cut sequence the other norms, biases of sums, positions."""
    if not job.sequence_parallel:
        return job.layers_of_a_stage * job.head_norm_parameters
    layer = 2 * job.norm_parameters + job.head_norm_parameters + (2 * job.width if job.biases else 0)
    last_norm = job.norm_parameters if job.pipeline == 1 else 0
    return job.layers_of_a_stage * layer + job.num_positions * job.width + last_norm


def _context(job: Job) -> Iterator[Transfer]:
    if job.context == 1:
        return
    element = job.tokens * job.compute_bytes
    queries, keys = job.query_features * element, job.key_features * element
    layers = job.num_microbatches * job.layers_of_a_stage
    if job.context_exchange == "gather":
        gathers = layers * (1 if job.recompute is None else 2)
        yield Transfer("all-gather", "context", 2 * keys * job.context, gathers, job.context, job.tensor)
        yield Transfer("reduce-scatter", "context", 2 * keys * job.context, layers, job.context, job.tensor)
        return
    # Queries, keys and values at once, and what comes of them, forward and backward; with dropout a number of each
    # query.
    entering, leaving = {None: (2, 2), "full": (3, 3), "selective": (3, 2)}[job.recompute]
    yield Transfer("all-to-all", "context", queries + 2 * keys, entering * layers, job.context, job.tensor)
    yield Transfer("all-to-all", "context", queries, leaving * layers, job.context, job.tensor)
    if job.attention_dropout:
        numbers = job.tokens * job.num_heads / job.tensor * FP32
        calls = layers * (1 if job.recompute is None else 2)
        yield Transfer("all-to-all", "context", numbers, calls, job.context, job.tensor)


def _pipeline(job: Job) -> Iterator[Transfer]:
    if job.pipeline == 1:
        return
    stride = job.tensor * job.context * job.data
    # Of each part what leaves it forward and what leaves it backward, but for the ends of the model.
    ways = 2 * job.parts - (1 if job.pipeline == 2 else 0)
    yield Transfer("send", "pipeline", job.stream, job.num_microbatches * ways, 2, stride)
    if job.tied:
        table = FP32 * table_parameters(job) / _sharers_of_sums(job)
        yield Transfer("all-reduce", "tables", table, 1, 2, stride * (job.pipeline - 1))


def _replicas(job: Job) -> Iterator[Transfer]:
    if job.replicas == 1:
        return
    blocks = job.layers_of_a_stage * layer_parameters(job)
    ends = parameters_of_first_stage(job) - blocks
    sums = FP32 * (blocks + ends)
    if job.sharding == "none":
        yield Transfer("all-reduce", "replicas", sums, 1, job.replicas, job.tensor)
        return
    if job.sharding == "optimizer":
        yield Transfer("reduce-scatter", "replicas", sums, 1, job.replicas, job.tensor)
        yield Transfer("all-gather", "replicas", sums, 1, job.replicas, job.tensor)
        return
    # Stages keep what they gathered, and the sums, until the step's last backward pass.
    passes = job.num_microbatches if job.pipeline == 1 else 1
    gathers = 1
    if job.sharding == "parameters":
        # What 1F1B gathers for a backward pass serves for the forward pass after it.
        gathers = 2 * job.num_microbatches if job.pipeline == 1 else job.num_microbatches + 1
    # Weights of blocks travel in the type of the computation, their gradients and the tables in fp32.
    weights = job.compute_bytes * blocks + FP32 * ends
    yield Transfer("all-gather", "replicas", weights, gathers, job.sharers, job.tensor)
    yield Transfer("reduce-scatter", "replicas", sums, passes, job.sharers, job.tensor)
    if job.sharers < job.replicas:
        copies, stride = job.replicas // job.sharers, job.tensor * job.sharers
        yield Transfer("all-reduce", "copies", sums / job.sharers, passes, copies, stride)


def parameters_of_first_stage(job: Job) -> float:
    """Elements of the weights there, before replicas share anything out; of the stages it has most."""
    if job.pipeline == 1:
        return parameters_on_rank(job)
    ends = table_parameters(job) + job.num_positions * job.width
    return job.layers_of_a_stage * layer_parameters(job) + ends

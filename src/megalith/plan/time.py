"""How long a step of a GPT's training takes, from its sizes and what is known of a machine: nothing is run.

A step's parts, each counted by what bounds it: products by their tiles (`products.py`), all that passes over memory by
bytes, collectives by latency and bytes, the start of kernels by the host, a pipeline by its slowest stage and what is
idle before and after it (Narayanan et al. 2021, arXiv:2104.04473). `python -m benchmarks.planner` holds the sums
against step times that others published and against our own.
"""

from dataclasses import dataclass, fields, replace

from megalith.plan.job import FP32, Job, layer_matrices, parameters_in_products, parameters_on_rank, table_parameters
from megalith.plan.machine import Machine
from megalith.plan.memory import MOMENT_BYTES, adds_in_products, is_rounded_once
from megalith.plan.traffic import Transfer, parameters_of_first_stage, transfers

MILLISECOND = 1e-3


@dataclass(frozen=True)
class Program:
    """What a training program does besides products and collectives. Passes are reads and writes of elements."""

    stream_passes: float  # forward, over the stream: norms, biases, dropout, sums
    inner_passes: float  # forward, over what tensor ranks share out, in units of the stream: GELU, heads, copies
    backward_passes: float  # of a backward pass, over those forward
    dropout_passes: float = 0.0  # with dropout, forward and backward together
    fp8_passes: float = 0.0  # with 8-bit products: scales and rounding, forward and backward together
    # Bytes that an attention which writes its scores moves for each of them, forward and backward; None: it does not.
    score_bytes: tuple[float, float] | None = None
    attention_dropout_slowdown: float = 1.0
    logit_bytes: float = 12.0  # moved for each logit, forward and backward
    cast_bytes: float = 0.0  # moved to round each weight of a product to 16 bits
    compact_bytes: float = 0.0  # moved besides for each weight to update it where moments take 8 bits
    gradient_bytes: float = 12.0  # moved for each weight in a microbatch to add its gradient up
    adds_in_products: bool = False  # a product does that, where it can
    travelling_bytes: float = FP32  # of a gradient between replicas
    host_forward: float = 0.0  # seconds to start a layer's kernels
    host_backward: float = 0.0
    gap: float = 8e-6  # seconds that a product costs besides
    fixed: float = 8e-3  # seconds of a step
    overlaps: bool = True  # gradients travel during the backward pass
    hides_exchanges: bool = True  # those of tensor ranks beside products take no time of these
    recomputes_all: bool = False  # with what no gradient needs
    shares_out_sends: bool = False  # tensor ranks send a part each of what all of them have


# By torch.compile on a GPU: bytes of a block's kernels are those that `python -m benchmarks.gpu_code` counts; what 8
# bits and dropout cost was measured (benchmarks/results).
COMPILED = Program(
    stream_passes=9.0,
    inner_passes=12.0,
    backward_passes=1.68,
    dropout_passes=7.0,
    fp8_passes=80.0,
    attention_dropout_slowdown=1.5,
    cast_bytes=6.0,
    adds_in_products=True,
    host_forward=0.3 * MILLISECOND,
    host_backward=0.6 * MILLISECOND,
)
# Kernel after kernel, on a GPU.
EAGER = replace(
    COMPILED,
    stream_passes=14.0,
    inner_passes=16.0,
    backward_passes=2.0,
    dropout_passes=40.0,
    logit_bytes=30.0,
    cast_bytes=12.0,
    host_forward=0.6 * MILLISECOND,
    host_backward=1.0 * MILLISECOND,
)

CPU = replace(
    EAGER,
    recomputes_all=True,  # an operation of ours keeps its input only after it has computed
    logit_bytes=24.0,
    cast_bytes=12.0,
    hides_exchanges=False,  # the same cores do both
    host_forward=0.2 * MILLISECOND,
    host_backward=0.3 * MILLISECOND,
    gap=0.0,
    fixed=10 * MILLISECOND,
)


def program_of(job: Job) -> Program:
    """What Megalith does besides products for this job."""
    if job.device == "cpu":
        return CPU
    return COMPILED if job.compiled else EAGER


@dataclass(frozen=True)
class Seconds:
    """Where a step's time goes on a rank of the stage that computes longest."""

    forward: float
    backward: float
    recomputation: float
    tensor: float  # collectives of tensor ranks
    context: float
    pipeline: float  # sends, and waiting for other stages
    reduction: float  # of gradients and weights over replicas, as far as no computation hides it
    optimizer: float
    other: float

    @property
    def total(self) -> float:
        return sum(float(getattr(self, field.name)) for field in fields(self))


@dataclass(frozen=True)
class _Passes:
    """Seconds of one microbatch's passes through something."""

    forward: float
    backward: float
    again: float = 0.0

    def __add__(self, other: "_Passes") -> "_Passes":
        return _Passes(self.forward + other.forward, self.backward + other.backward, self.again + other.again)

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.again


def predict_time(job: Job, machine: Machine, program: Program) -> Seconds:
    """Seconds of a step in the middle of a run."""
    m, moves = job.num_microbatches, transfers(job)
    layers, ends = stage_passes(job, machine, program), end_passes(job, machine, program)
    slowest = layers + (ends[0] + ends[1] if job.pipeline == 1 else max(ends, key=lambda end: end.total))
    tensor = tensor_seconds(job, machine, program, moves) / m
    context = seconds_of(moves, "context", machine) / m
    idle = sends = 0.0
    if job.pipeline > 1:
        # Of each part what enters and leaves, forward and backward.
        shared = job.tensor if program.shares_out_sends and not job.sequence_parallel else 1
        stride = job.tensor * job.context * job.data
        sends = 2 * job.parts * machine.send(job.stream / shared, stride)
        others = job.pipeline * (layers.total + tensor + context + sends) + ends[0].total + ends[1].total
        one = slowest.total + tensor + context + sends
        # Before the first microbatch and after the last each stage waits for the others; parts of a stage share that.
        idle = (others - one) / (job.parts if job.schedule == "interleaved" else 1)
        if job.schedule == "zero-bubble":
            idle /= 3 * job.parts  # Qi et al. 2023, arXiv:2401.10241: what the gradients of weights do not fill
    return Seconds(
        forward=m * slowest.forward,
        backward=m * slowest.backward,
        recomputation=m * slowest.again,
        tensor=m * tensor,
        context=m * context,
        pipeline=m * sends + idle,
        reduction=reduction_seconds(job, machine, program, moves, slowest),
        optimizer=machine.passes(update_bytes(job, program)),
        other=program.fixed,
    )


def stage_passes(job: Job, machine: Machine, program: Program) -> _Passes:
    """A microbatch through the layers of a stage: as long as the device takes, or the host to start it all."""
    layer, layers = layer_passes(job, machine, program), job.layers_of_a_stage
    again = layers * layer.again
    host_again = layers * program.host_forward if job.recompute == "full" else 0.0
    return _Passes(
        layers * max(layer.forward, program.host_forward),
        layers * max(layer.backward, program.host_backward),
        max(again, host_again),
    )


def layer_passes(job: Job, machine: Machine, program: Program) -> _Passes:
    """A microbatch through one layer, on the device, without collectives."""
    tokens, size = job.tokens, job.compute_bytes
    forward = backward = 0.0
    for entering, leaving in layer_matrices(job):
        forward += machine.product(tokens, entering, leaving, size=size, fp8=job.fp8) + program.gap
        backward += machine.product(tokens, leaving, entering, size=size, fp8=job.fp8) + program.gap
        backward += machine.product(leaving, tokens, entering, size=size, fp8=job.fp8) + program.gap
    last = machine.product(tokens, job.inner / job.tensor, job.width, size=size, fp8=job.fp8) + program.gap
    attention = attention_passes(job, machine, program)
    passes = tokens * job.width * (program.stream_passes / job.cut + program.inner_passes / job.tensor) * size
    further = program.dropout_passes * (job.dropout or job.attention_dropout) + program.fp8_passes * job.fp8
    further *= tokens * job.width / job.cut * size
    cast = 0.0 if size == FP32 else program.cast_bytes / (job.num_microbatches if is_rounded_once(job) else 1)
    added = program.gradient_bytes
    if program.adds_in_products and adds_in_products(job):
        added = FP32 * (1 - 1 / job.num_microbatches)  # read once more, but by the first
    weights = parameters_in_products(job) * (cast + added)
    forward += attention.forward + machine.passes(passes + further / 3)
    backward += attention.backward + machine.passes(passes * program.backward_passes + further * 2 / 3 + weights)
    again = {"full": forward, "selective": attention.forward}.get(job.recompute or "", 0.0)
    if job.recompute == "full" and not program.recomputes_all:
        again -= last / job.recompute_every
    return _Passes(forward, backward, again)


def attention_passes(job: Job, machine: Machine, program: Program) -> _Passes:
    """Scores, softmax and the sum of values of one layer."""
    heads, size = job.num_heads / job.tensor, job.compute_bytes
    queries = job.sequence_length / job.context
    if program.score_bytes is None:
        # Half the scores are seen: two products of them forward, five backward (Dao et al. 2022, arXiv:2205.14135).
        operations = 2 * job.tokens * job.sequence_length * heads * job.head_width
        slower = program.attention_dropout_slowdown if job.attention_dropout else 1.0
        forward = slower * operations / (machine.flops * machine.attention_share)
        return _Passes(forward, slower * 2.5 * operations / (machine.flops * machine.attention_backward_share))
    batch = job.micro_batch_size * heads
    scores = batch * queries * job.sequence_length
    products = machine.product(queries, job.head_width, job.sequence_length, size=size, batch=batch)
    products += machine.product(queries, job.sequence_length, job.head_width, size=size, batch=batch)
    forward_bytes, backward_bytes = program.score_bytes
    products += 2 * program.gap
    return _Passes(
        products + machine.passes(forward_bytes * scores), 2 * products + machine.passes(backward_bytes * scores)
    )


def end_passes(job: Job, machine: Machine, program: Program) -> tuple[_Passes, _Passes]:
    """A microbatch through what stands before the first layer, and after the last with the loss."""
    tokens, vocabulary, size = job.tokens, job.vocab_size / job.tensor, job.compute_bytes
    stream, table = tokens * job.width * size, FP32 * table_parameters(job)
    look_up = _Passes(machine.passes(3 * stream), machine.passes(3 * stream + 2 * table))
    logits = machine.passes(program.logit_bytes * tokens * vocabulary)
    forward = machine.product(tokens, job.width, vocabulary, size=size)
    backward = machine.product(tokens, vocabulary, job.width, size=size)
    backward += machine.product(vocabulary, tokens, job.width, size=size)
    return look_up, _Passes(forward + logits / 3, backward + logits * 2 / 3)


def seconds_of(moves: list[Transfer], purpose: str, machine: Machine) -> float:
    """Of all transfers of a purpose, one after the other."""
    return sum(
        move.calls * machine.collective(move.sent, move.ranks, move.stride) for move in moves if move.purpose == purpose
    )


def tensor_seconds(job: Job, machine: Machine, program: Program, moves: list[Transfer]) -> float:
    """What tensor ranks wait for each other in a step, as far as no product hides it."""
    beside = [move for move in moves if move.purpose == "tensor" and move.is_beside]
    if not program.hides_exchanges or not beside:
        return seconds_of(moves, "tensor", machine)
    waited = seconds_of([move for move in moves if not move.is_beside], "tensor", machine)
    attention, _, *feed_forward, _ = layer_matrices(job)
    for matrices in ([attention], feed_forward):
        # What is gathered again is beside the gradient by the input, whose sum is beside the gradient by the weights.
        by_input = sum(
            machine.product(job.tokens, leaving, entering, size=job.compute_bytes, fp8=job.fp8)
            for entering, leaving in matrices
        )
        by_weight = sum(
            machine.product(leaving, job.tokens, entering, size=job.compute_bytes, fp8=job.fp8)
            for entering, leaving in matrices
        )
        for move in beside:
            seconds = machine.collective(move.sent, move.ranks, move.stride)
            hidden = by_input if move.collective == "all-gather" else by_weight
            waited += move.calls / 2 * max(0.0, seconds - hidden)
    return waited


def reduction_seconds(
    job: Job, machine: Machine, program: Program, moves: list[Transfer], microbatch: _Passes
) -> float:
    """What replicas wait for their gradients and weights, and the ends of a pipeline for their table's."""
    share = program.travelling_bytes / FP32
    replicas = share * (seconds_of(moves, "replicas", machine) + seconds_of(moves, "copies", machine))
    tables = share * seconds_of(moves, "tables", machine)
    hidden = 0.0
    if job.shares_weights:
        # FSDP2 gathers the next layer while this one computes; a pipeline's gradients wait for its last pass.
        hidden = job.num_microbatches * microbatch.total if job.pipeline == 1 else microbatch.total
    elif job.schedule != "zero-bubble":
        hidden = microbatch.backward + microbatch.again
    if not program.overlaps:
        hidden = 0.0
    # Weights that one rank each has updated are gathered when all is done.
    gathers = replicas / 2 if job.sharding == "optimizer" else 0.0
    early = replicas - gathers
    # Something is always left over: the first gather, or the last bucket.
    return max(early - hidden, early / max(1, 2 * job.layers_of_a_stage)) + gathers + tables


def update_bytes(job: Job, program: Program) -> float:
    """Bytes that the norm of the gradients and the optimizer move: a read of gradients, then all of them and their
    states once, and what is written of them."""
    moments = 2 * MOMENT_BYTES[job.moments] if job.optimizer == "adam" else FP32
    owned = parameters_on_rank(job) if job.pipeline == 1 else parameters_of_first_stage(job)
    if job.sharding == "optimizer":
        owned /= job.replicas
    elif job.shares_weights:
        owned /= job.sharers
    return owned * (4 * FP32 + 2 * moments + (program.compact_bytes if job.moments == "int8" else 0.0))

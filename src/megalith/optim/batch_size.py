"""How many sequences a step takes, and in how many micro-batches.

Both are pure functions of the samples consumed so far (skipped steps count), so a resume needs that one number.
"""

from dataclasses import dataclass

from megalith.optim.settings import OptimizerConfig


@dataclass(frozen=True)
class ConstantBatch:
    """Every step takes the same number of sequences, over all ranks.

    Raises ValueError if it is not a whole number of micro-batches on every replica.
    """

    global_batch_size: int
    micro_batch_size: int  # sequences per forward pass and replica
    data_parallel: int  # replicas

    def __post_init__(self) -> None:
        per_round = _positive_round(self.micro_batch_size, self.data_parallel)
        if self.global_batch_size < 1 or self.global_batch_size % per_round:
            raise ValueError(
                f"global batch size ({self.global_batch_size}) is not divisible by micro batch size "
                f"({self.micro_batch_size}) times data parallel size ({self.data_parallel}). "
                f"Change --global-batch-size to a multiple of {per_round}"
            )

    def batch_size(self, consumed_samples: int) -> int:
        """Sequences of the step that follows consumed_samples samples."""
        return self.global_batch_size

    def num_microbatches(self, consumed_samples: int) -> int:
        """Micro-batches of that step, per replica."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)


@dataclass(frozen=True)
class RampedBatch:
    """The number of sequences per step grows in equal steps from `start` to `global_batch_size`.

    A size in between need not be a whole number of micro-batches: `num_microbatches` raises where it is not, and
    `faults` tells beforehand. Raises ValueError if the sizes cannot be reached.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel: int
    start: int  # sequences of the first step
    increment: int  # sequences
    ramp_samples: int  # samples over which the size grows

    def __post_init__(self) -> None:
        _positive_round(self.micro_batch_size, self.data_parallel)
        words = f"{self.start} {self.increment} {self.ramp_samples}"
        if self.start < 1 or self.increment < 1 or self.ramp_samples < 1:
            raise ValueError(f"rampup_batch_size={words} takes three numbers above 0: START INCREMENT SAMPLES")
        growth = self.global_batch_size - self.start
        if growth < 0:
            raise ValueError(
                f"rampup_batch_size={words} must start at or below the global batch size ({self.global_batch_size}). "
                "Lower its start"
            )
        if growth % self.increment:
            raise ValueError(
                f"expected global batch size interval ({growth}) to be divisible by global batch size increment "
                f"({self.increment}). Change the increment of --rampup-batch-size"
            )
        if growth == 0:
            raise ValueError(
                f"rampup_batch_size={words} starts at the global batch size, so there is no ramp. Leave it out"
            )

    @property
    def samples_per_increment(self) -> float:
        """Samples after which the size grows by one increment."""
        return self.ramp_samples / ((self.global_batch_size - self.start) // self.increment)

    def batch_size(self, consumed_samples: int) -> int:
        """Sequences of the step that follows consumed_samples samples."""
        if consumed_samples > self.ramp_samples:
            return self.global_batch_size
        return self.start + int(consumed_samples / self.samples_per_increment) * self.increment

    def num_microbatches(self, consumed_samples: int) -> int:
        """Micro-batches of that step, per replica. Raises ValueError if its batch is no whole number of them."""
        size = self.batch_size(consumed_samples)
        per_round = self.micro_batch_size * self.data_parallel
        if size % per_round:
            raise ValueError(
                f"current global batch size ({size}) is not divisible by micro-batch-size ({self.micro_batch_size}) "
                f"times data parallel size ({self.data_parallel}). Make start and increment of --rampup-batch-size "
                f"multiples of {per_round}"
            )
        return size // per_round


def make_batch_sizes(config: OptimizerConfig, *, data_parallel: int) -> ConstantBatch | RampedBatch:
    """The batch sizes of a run on that many replicas. Raises ValueError if the settings do not fit together."""
    if config.micro_batch_size is None:
        raise ValueError("micro_batch_size=None must be given. Use --micro-batch-size")
    global_batch_size = config.global_batch_size or config.micro_batch_size * data_parallel
    if config.rampup_batch_size is None:
        return ConstantBatch(global_batch_size, config.micro_batch_size, data_parallel)
    words = config.rampup_batch_size
    if len(words) != 3 or not all(word.isdecimal() for word in words):
        raise ValueError(f"rampup_batch_size={' '.join(words)} takes three whole numbers: START INCREMENT SAMPLES")
    start, increment, ramp_samples = (int(word) for word in words)
    return RampedBatch(global_batch_size, config.micro_batch_size, data_parallel, start, increment, ramp_samples)


def steps_for_samples(train_samples: int, batches: ConstantBatch | RampedBatch) -> int:
    """Steps of a run over train_samples samples, see `steps_left`. Raises ValueError if there is none."""
    steps = steps_left(train_samples, batches, 0)
    if steps < 1:
        raise ValueError(
            f"train_samples={train_samples} is too short for one step of {batches.global_batch_size} samples. "
            "Raise --train-samples, or lower --global-batch-size or the ramp"
        )
    return steps


def steps_left(train_samples: int, batches: ConstantBatch | RampedBatch, consumed_samples: int) -> int:
    """Steps that a run over train_samples samples still takes; a last batch that is not full is left out.

    As many as in Megatron-LM, but for a run that ends inside of its ramp: there it would take more samples. Negative by
    so many full batches if too many samples are consumed already.
    """
    steps, size = 0, batches.batch_size(consumed_samples)
    while size < batches.global_batch_size and consumed_samples + size <= train_samples:
        steps, consumed_samples = steps + 1, consumed_samples + size
        size = batches.batch_size(consumed_samples)
    return steps + (train_samples - consumed_samples) // batches.global_batch_size


def consumed_after(batches: ConstantBatch | RampedBatch, consumed_samples: int, steps: int) -> int:
    """Samples consumed when so many further steps have been taken."""
    while steps > 0 and batches.batch_size(consumed_samples) != batches.global_batch_size:
        consumed_samples += batches.batch_size(consumed_samples)
        steps -= 1
    return consumed_samples + steps * batches.global_batch_size


def _positive_round(micro_batch_size: int, data_parallel: int) -> int:
    """Sequences that all replicas take at a time."""
    if micro_batch_size < 1 or data_parallel < 1:
        raise ValueError(
            f"micro batch size ({micro_batch_size}) and data parallel size ({data_parallel}) must be above 0. "
            "Change --micro-batch-size"
        )
    return micro_batch_size * data_parallel

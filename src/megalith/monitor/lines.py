"""The lines of Megatron-LM's log, character for character: a string from the values it shows, and nothing else.

Scripts parse these lines, so every blank, width and digit counts, and the misspelt words stay misspelt.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence

from megalith.monitor.events import IntervalDone
from megalith.monitor.memory import MemoryUse

MEBIBYTE = 1 << 20


def world(world_size: int, *, data: int, tensor: int, pipeline: int) -> str:
    return (
        f"using world size: {world_size}, data-parallel-size: {data}, tensor-model-parallel size: {tensor}, "
        f"pipeline-model-parallel size: {pipeline} "
    )


def parameters_dtype(dtype: str) -> str:
    """dtype by torch's name, without its module: float16."""
    return f"using torch.{dtype} for parameters ..."


def arguments(values: Mapping[str, object]) -> list[str]:
    """The argument block: sorted by the whole line in lower case, so that an upper-case name stands in its place."""
    shown = [f"  {name} {'.' * (48 - len(name))} {value}" for name, value in values.items()]
    title = f"{'-' * 24} arguments {'-' * 24}"
    end = f"{'-' * 20} end of arguments {'-' * 21}"
    return [title, *sorted(shown, key=str.lower), end]


def microbatches(number: int) -> str:
    return f"setting number of micro-batches to constant {number}"


def batch_rampup(start: int, end: int, *, increment: int, samples: int) -> str:
    return (
        f"will use batch size rampup starting from global batch size {start} to global batch size {end} "
        f"with batch size increments {increment} over {samples} samples."
    )


def building_tokenizer(name: str) -> str:
    return f"> building {name} tokenizer ..."


def padded_vocabulary(size: int, padded: int) -> str:
    return f" > padded vocab (size: {size}) with {padded - size} dummy tokens (new size: {padded})"


def setting_tensorboard() -> str:
    return "> setting tensorboard ..."


def initializing_distributed() -> str:
    return "> initializing torch distributed ..."


def initializing_model_parallel(axis: str, size: int) -> str:
    """axis: tensor or pipeline."""
    return f"> initializing {axis} model parallel with size {size}"


def setting_seeds(seed: int) -> str:
    return f"> setting random seeds to {seed} ..."


def model_parallel_seeds(
    *, rank: int, model_parallel_rank: int, data_parallel_rank: int, model_parallel_seed: int, data_parallel_seed: int
) -> str:
    return (
        f"> initializing model parallel cuda seeds on global rank {rank}, model parallel rank {model_parallel_rank}, "
        f"and data parallel rank {data_parallel_rank} with model parallel seed: {model_parallel_seed} "
        f"and data parallel seed: {data_parallel_seed}"
    )


def initialized(seconds: float) -> str:
    return f"time to initialize megatron (seconds): {seconds:.3f}"


def place_reached(place: str, now: float) -> str:
    """now in Unix seconds, shown in local time; the line ends with a blank."""
    return f"[{place}] datetime: {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))} "


def building_model(name: str) -> str:
    return f"building {name} model ..."


def number_of_parameters(tensor_rank: int, pipeline_rank: int, number: int) -> str:
    return (
        f" > number of parameters on (tensor, pipeline) model parallel rank ({tensor_rank}, {pipeline_rank}): {number}"
    )


def decay_style(style: str) -> str:
    return f"> learning rate decay style: {style}"


def building_datasets(name: str = "") -> str:
    """name: the task's, or empty for the line that opens the whole."""
    return f"> building train, validation, and test datasets {f'for {name} ' if name else ''}..."


def targets(*, train: int, validation: int, test: int) -> list[str]:
    return [
        " > datasets target sizes (minimum size):",
        f"    train:      {train}",
        f"    validation: {validation}",
        f"    test:       {test}",
    ]


def corpus_opened(
    num_documents: int, seconds: float, *, warmed_up: bool, num_sentences: int | None = None
) -> list[str]:
    """num_sentences: where a document has several."""
    return [
        " > building dataset index ...",
        *(["    warming up index mmap file..."] if warmed_up else []),
        "    reading sizes...",
        "    reading pointers...",
        "    reading document index...",
        *(["    warming up data mmap file..."] if warmed_up else []),
        "    creating numpy buffer of mmap...",
        "    creating memory view of numpy buffer...",
        f" > finished creating indexed dataset in {seconds:.6f} seconds",
        *([] if num_sentences is None else [" > indexed dataset stats:"]),
        f"    number of documents: {num_documents}",
        *([] if num_sentences is None else [f"    number of sentences: {num_sentences}"]),
    ]


def dataset_split(parts: Iterable[tuple[str, int, int, tuple[int, int] | None]]) -> list[str]:
    """parts: name, first document and the one past the last, the same of sentences where documents have them."""
    shown = [" > dataset split:"]
    for name, first, end, sentences in parts:
        shown += [
            f"    {name}:",
            f"     document indices in [{first}, {end}) total of {end - first} documents",
        ]
        if sentences is not None:
            begin, stop = sentences
            shown.append(f"     sentence indices in [{begin}, {stop}) total of {stop - begin} sentences")
    return shown


def maps_missing() -> str:
    return " > WARNING: could not find index map files, building the indices on rank 0 ..."


def last_epoch(last: int, per_epoch: int, *, num_epochs: int, separate: bool) -> str:
    """last, per_epoch: samples in the last epoch and in a whole one."""
    if num_epochs == 1:
        return " > only one epoch required, setting separate_last_epoch to False"
    relation = "smaller" if separate else "larger"
    return (
        f" > last epoch number of samples ({last}) is {relation} than 80% of number of samples per epoch "
        f"({per_epoch}), setting separate_last_epoch to {separate}"
    )


def map_built(name: str, seconds: float) -> str:
    """name: doc, sample or shuffle."""
    return f" > elasped time to build and save {name}-idx mapping (seconds): {seconds:4f}"


def sample_map_sizes(*, num_documents: int, num_epochs: int, seq_length: int, num_samples: int) -> list[str]:
    return [
        "    using:",
        f"     number of documents:       {num_documents}",
        f"     number of epochs:          {num_epochs}",
        f"     sequence length:           {seq_length}",
        f"     total number of samples:   {num_samples}",
    ]


def shuffle_split(first: int, total: int) -> str:
    return f" > building shuffle index with split [0, {first}) and [{first}, {total}) ..."


def maps_loaded(paths: Sequence[str], seconds: float, *, num_samples: int, num_epochs: int) -> list[str]:
    """paths: of the doc, sample and shuffle maps. The number shown is the sample map's rows, one more than samples."""
    names = ("doc", "sample", "shuffle")
    return [
        *(f" > loading {name}-idx mapping from {path}" for name, path in zip(names, paths, strict=True)),
        f"    loaded indexed file in {seconds:.3f} seconds",
        f"    total number of samples: {num_samples + 1}",
        f"    total number of epochs: {num_epochs}",
    ]


def sentence_map_loaded(path: str, seconds: float, *, num_samples: int) -> list[str]:
    return [
        f" > loading indexed mapping from {path}",
        f"    loaded indexed file in {seconds:.3f} seconds",
        f"    total number of samples: {num_samples}",
    ]


def blend_built(weights: Sequence[float], achieved: Sequence[float], seconds: float) -> list[str]:
    return [
        "> building indices for blendable datasets ...",
        " > sample ratios:",
        *(
            f"   dataset {number}, input: {wanted:g}, achieved: {share:g}"
            for number, (wanted, share) in enumerate(zip(weights, achieved, strict=True))
        ),
        f"> elapsed time for building blendable dataset indices: {seconds:.2f} (sec)",
    ]


def datasets_built(name: str) -> str:
    return f"> finished creating {name} datasets ..."


def setup_done() -> str:
    return "done with setup ..."


def training() -> str:
    return "training ..."


def timers(seconds: Mapping[str, float], *, divided_by: int) -> str:
    shown = (f" | {name}: {1000.0 * value / divided_by:.2f}" for name, value in seconds.items())
    return "time (ms)" + "".join(shown)


def iteration(interval: IntervalDone) -> str:
    """The line of every log_interval steps. A loss that is not above zero is left out, nan among them."""
    fields = [
        f"iteration {interval.step:8d}/{interval.last_step:8d}",
        f"consumed samples: {interval.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {1000.0 * interval.seconds / interval.num_steps:.1f}",
        f"learning rate: {interval.learning_rate:.3E}",
        f"global batch size: {interval.global_batch_size:5d}",
        *(f"{name}: {loss:.6E}" for name, loss in interval.losses.items() if loss > 0.0),
        f"loss scale: {interval.loss_scale:.1f}",
        *optional("grad norm", interval.grad_norm, ".3f"),
        *optional("num zeros", interval.num_zeros, ".1f"),
        *optional("params norm", interval.params_norm, ".3f"),
        f"number of skipped iterations: {interval.num_skipped:3d}",
        f"number of nan iterations: {interval.num_nan:3d}",
    ]
    return "".join(f" {field} |" for field in fields)


def optional(name: str, value: float | None, form: str) -> list[str]:
    return [] if value is None else [f"{name}: {value:{form}}"]


def memory(rank: int, step: int, use: MemoryUse) -> str:
    """Mebibytes, in Python's shortest form of the number."""
    return (
        f"[Rank {rank}] (after {step} iterations) memory (MB) | allocated: {use.allocated / MEBIBYTE} "
        f"| max allocated: {use.max_allocated / MEBIBYTE} | reserved: {use.reserved / MEBIBYTE} "
        f"| max reserved: {use.max_reserved / MEBIBYTE}"
    )


def evaluating(number: int, total: int) -> str:
    return f"Evaluating iter {number}/{total}"


def evaluation(place: str, losses: Mapping[str, float]) -> list[str]:
    """A row of hyphens, the losses, a row of hyphens; a row has one hyphen more than the text has characters."""
    text = f" validation loss at {place} | "
    for name, loss in losses.items():
        text += f"{name} value: {loss:.6E} | {name} PPL: {perplexity(loss):.6E} | "
    row = "-" * (len(text) + 1)
    return [row, text, row]


def perplexity(loss: float) -> float:
    """exp(loss), of at most 20 so that the number stays readable; nan for nan."""
    return loss if math.isnan(loss) else math.exp(min(20.0, loss))


def saving(step: int, directory: str) -> str:
    return f"saving checkpoint at iteration {step:7d} to {directory}"


def saved(step: int, directory: str) -> str:
    return f"  successfully saved checkpoint at iteration {step:7d} to {directory}"


def loading(directory: str, step: int | None) -> str:
    """step None: a release checkpoint."""
    if step is None:
        return f" loading release checkpoint from {directory}"
    return f" loading checkpoint from {directory} at iteration {step}"


def checkpoint_version(version: str) -> str:
    return f" checkpoint version {version}"


def loaded(directory: str, step: int) -> str:
    return f"  successfully loaded checkpoint from {directory} at iteration {step}"


def checkpoint_missing(tracker: str) -> list[str]:
    return [
        f"WARNING: could not find the metadata file {tracker} ",
        "    will not load any checkpoints and will start from random",
    ]

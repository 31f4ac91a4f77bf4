"""What a task needs of a run beside what all need: every fault at once."""

import math
from collections.abc import Callable, Iterator

from megalith.check_bert import bert_faults
from megalith.check_classify import classify_faults
from megalith.check_ict import ict_faults, retriever_faults
from megalith.check_layout import divisors
from megalith.check_t5 import t5_faults
from megalith.check_vit import vit_faults
from megalith.config import Fault, Run, fault, known_settings
from megalith.fields import describe
from megalith.models.shape import OPTIONS, options_of


def task_faults(run: Run) -> list[Fault]:
    """Every fault of the settings of the run's task."""
    rules = RULES.get(run.task)
    return [
        *_layouts(run),
        *_options(run),
        *_biases(run),
        *_activation(run),
        *_positions(run),
        *_groups(run),
        *_mock_data(run),
        *_corpus(run),
        *(() if rules is None else rules(run)),
    ]


def _layouts(run: Run) -> Iterator[Fault]:
    """Layouts that only a causal decoder has."""
    size = run.parallel.context_parallel_size
    if run.task != "gpt" and size > 1:
        rule = f"cuts the sequence of a gpt over ranks; {run.task} has no such layout"
        yield fault("context_parallel_size", size, rule, "Leave it out; use tensor or data parallelism")


def _options(run: Run) -> Iterator[Fault]:
    """What shape_of would give any task, and only some have."""
    for name in OF_SOME_TASKS:
        value, known = getattr(run.model, name), known_settings()[name]
        if value != known.field.default and not known.concerns(run.task):
            shown, tasks = None if isinstance(value, bool) else value, describe(known.field)["task"]
            yield fault(name, shown, f"is an option of {tasks}; {run.task} has none such", "Leave it out")


def _biases(run: Run) -> Iterator[Fault]:
    if run.model.add_qkv_bias and run.model.add_bias_linear and run.task == "gpt":
        rule = "adds what is there without --disable-bias-linear"
        yield fault("add_qkv_bias", None, rule, "Add that, or leave this out")


def _activation(run: Run) -> Iterator[Fault]:
    activation = run.model.activation_function
    if run.model.swiglu and activation != "gelu":
        yield fault("activation_function", activation, "contradicts --swiglu", "Give only one of them")


def _positions(run: Run) -> Iterator[Fault]:
    """Positions of a kind that the task has not, and angles that fit no head."""
    model, kind = run.model, run.model.position_embedding_type
    others = [task for task, kinds in POSITIONS.items() if kind in kinds and task != run.task]
    if run.task in POSITIONS and kind not in POSITIONS[run.task]:
        known = " or ".join(POSITIONS[run.task])
        yield fault("position_embedding_type", kind, f"is an option of {', '.join(others)}", f"Use {known}")
    if kind != "rope":
        for name in ("rotary_base", "rotary_percent", "use_rope_scaling", "rope_scaling_factor"):
            if name in options_of(model) and run.task == "gpt":
                rule, value = f"is of --position-embedding-type rope, not of {kind}", getattr(model, name)
                yield fault(name, None if value is True else value, rule, "Add that, or leave this out")
        return
    if not model.rotary_base > 1:
        yield fault("rotary_base", model.rotary_base, "must be above 1", "Give such a number; 10000 is usual")
    if not model.use_rope_scaling and "rope_scaling_factor" in options_of(model):
        yield fault("rope_scaling_factor", model.rope_scaling_factor, "needs --use-rope-scaling", "Add that")
    if not 1 <= model.rope_scaling_factor < math.inf:
        yield fault("rope_scaling_factor", model.rope_scaling_factor, "must be at least 1", "8 is usual, or 32")
    heads, width = model.num_attention_heads, model.kv_channels
    if width is None and heads and model.hidden_size and model.hidden_size % heads == 0:
        width = model.hidden_size // heads
    if not 0 < model.rotary_percent <= 1:
        yield fault("rotary_percent", model.rotary_percent, "must be above 0 and at most 1", "1 is usual")
    elif width and (turned := int(width * model.rotary_percent)) % 2 + (turned == 0):
        rule = f"gives {turned} of a head's {width} features, and they turn in pairs"
        yield fault("rotary_percent", model.rotary_percent, rule, "Change it, or --kv-channels, to an even number")


def _groups(run: Run) -> Iterator[Fault]:
    """Heads share keys and values in whole groups."""
    groups, heads = run.model.num_query_groups, run.model.num_attention_heads
    if not run.model.group_query_attention:
        if groups > 1 and run.task == "gpt":
            yield fault("num_query_groups", groups, "needs --group-query-attention", "Add that")
    elif heads and groups > 0 and heads % groups:
        rule = f"does not divide --num-attention-heads = {heads}"
        yield fault("num_query_groups", groups, rule, f"Groups that do: {divisors(heads)}")


def _mock_data(run: Run) -> Iterator[Fault]:
    if run.data.mock_data and run.task not in MOCKED:
        rule = f"makes up data for {', '.join(MOCKED)}, not for {run.task}"
        yield fault("mock_data", None, rule, "Give real data, or --corpus")


def _corpus(run: Run) -> Iterator[Fault]:
    """A corpus is of text or of images."""
    corpus = run.data.corpus
    if corpus is not None and run.task == "classify":
        yield fault("corpus", corpus, "has no classes to learn", "Give --train-data and --valid-data")
    elif corpus is not None and run.task == "retriever":
        yield fault("corpus", corpus, "has no questions", "Give --train-data and --valid-data")
    elif corpus is not None and (corpus == "shapes") != (run.task == "vit"):
        fits = "shapes" if run.task == "vit" else "python"
        yield fault("corpus", corpus, f"is no data for {run.task}", f"Use --corpus {fits}")


# Options of the model that are not every task's.
OF_SOME_TASKS = (
    "norm_after_residual",
    *OPTIONS,
    "softmax_scale",
    "output_bias",
    "scale_decoder_outputs",
)
# Kinds of positions of the tasks that have several.
POSITIONS = {"gpt": ("learned_absolute", "rope"), "t5": ("learned_absolute", "relative")}
# Tasks whose rows can make up data.
MOCKED = ("gpt", "bert", "t5", "ict", "vit")
# What is checked for one task alone.
RULES: dict[str, Callable[[Run], Iterator[Fault]]] = {
    "bert": bert_faults,
    "t5": t5_faults,
    "ict": ict_faults,
    "vit": vit_faults,
    "classify": classify_faults,
    "retriever": retriever_faults,
}

"""`megalith convert`: checkpoints of Megatron-LM and models of Hugging Face into run directories, and back.

A converted run goes on where the other program stopped: weights, optimizer, schedule, loss scale, samples consumed. Its
dropout differs from then on, for ours is derived from the step and the sample instead of a generator's state.
"""

import argparse
from collections.abc import Sequence

from megalith.command_line import CommandParser
from megalith.terminal import printable, why_no_text

HUGGING_FACE = "huggingface"  # a kind of checkpoint
TOKENIZER = ("vocab_file", "merge_file", "tokenizer_model", "tokenizer_type")
# What each conversion reads beside its directories.
READ = {
    "--from megatron": ("iteration", "weights_only", *TOKENIZER),
    f"--from {HUGGING_FACE}": TOKENIZER,
    "--to megatron": (
        "iteration",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_layers_per_virtual_pipeline_stage",
    ),
    f"--to {HUGGING_FACE}": ("iteration",),
}
ALL_READ = {name for names in READ.values() for name in names}


def main(words: Sequence[str]) -> int:
    """Convert a checkpoint of another program into a run directory, or the newest of a run directory into its files."""
    for word in words:
        if unfit := why_no_text(word):
            raise ValueError(f"{word}: {unfit[0]}. {unfit[1]}.")
    parser = _parser()
    options = parser.parse_args(words)
    what = f"--to {options.target[0]}" if options.source is None else f"--from {options.source[0]}"
    if what in READ and (idle := parser.given(options, ALL_READ - {*READ[what]})):
        raise ValueError(f"{', '.join(sorted(idle))}: nothing reads it with {what}. Leave it out.")

    from megalith.checkpoint.directory import CheckpointError

    try:
        return _to_other(options) if options.source is None else _from_other(options)
    except CheckpointError as error:
        raise ValueError(str(error)) from error


def _to_other(options: argparse.Namespace) -> int:
    if len(options.target) != 3:
        raise ValueError(
            f"--to {' '.join(options.target)}: without --from it takes three words: megatron or {HUGGING_FACE}, "
            "RUN_DIR and OUT_DIR"
        )
    kind, run_dir, directory = options.target
    _check_kind(kind)
    if kind == HUGGING_FACE:
        from megalith.convert_to_hugging_face import to_hugging_face

        lines = to_hugging_face(run_dir, directory, step=options.iteration)
    else:
        from megalith.convert_to_megatron import to_megatron

        lines = to_megatron(
            run_dir,
            directory,
            step=options.iteration,
            tensor=options.tensor_model_parallel_size,
            stages=options.pipeline_model_parallel_size,
            layers_per_chunk=options.num_layers_per_virtual_pipeline_stage,
        )
    for line in lines:
        print(printable(line), flush=True)
    return 0


def _from_other(options: argparse.Namespace) -> int:
    kind, directory = options.source
    _check_kind(kind)
    if len(options.target) != 1:
        raise ValueError(f"--to {' '.join(options.target)}: with --from it takes one word, the run directory to make")

    given = {name: getattr(options, name) for name in TOKENIZER}
    tokenizer_settings = {name: value for name, value in given.items() if value is not None}
    if kind == HUGGING_FACE:
        from megalith.convert_from_hugging_face import from_hugging_face

        lines = from_hugging_face(directory, options.target[0], tokenizer_settings=tokenizer_settings)
    else:
        from megalith.convert_from_megatron import from_megatron

        lines = from_megatron(
            directory,
            options.target[0],
            iteration=options.iteration,
            weights_only=options.weights_only,
            tokenizer_settings=tokenizer_settings,
        )
    for line in lines:
        print(printable(line), flush=True)
    return 0


def _check_kind(kind: str) -> None:
    if kind not in ("megatron", HUGGING_FACE):
        raise ValueError(f"{kind}: is not a kind of checkpoint that can be converted; megatron and {HUGGING_FACE} are")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="megalith convert",
        usage="megalith convert --from megatron|huggingface DIR --to RUN_DIR [...]\n"
        "       megalith convert --to megatron|huggingface RUN_DIR OUT_DIR [...]",
        description=main.__doc__,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--from",
        dest="source",
        nargs=2,
        metavar=("KIND", "DIR"),
        help="megatron and what --save named there, or huggingface and the directory of a GPT-2, Llama, Qwen2, Qwen3 "
        "or T5",
    )
    parser.add_argument(
        "--to",
        dest="target",
        nargs="+",
        required=True,
        metavar="WORD",
        help="RUN_DIR, or megatron or huggingface, RUN_DIR and OUT_DIR",
    )
    parser.add_argument("--iteration", type=int, metavar="N", help="the checkpoint of that step [the latest]")
    parser.add_argument("--weights-only", action="store_true", help="leave optimizer, schedule and progress behind")
    for name, what in {
        "vocab-file": "the vocabulary, where it lies now",
        "merge-file": "the BPE merges, where they lie now",
        "tokenizer-model": "the tokenizer's file, for kinds that have one",
        "tokenizer-type": "another tokenizer than the checkpoint names",
    }.items():
        parser.add_argument(f"--{name}", metavar="TEXT", help=f"with --from: {what}")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="with --to megatron [1]")
    parser.add_argument(
        "--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="with --to megatron [1]"
    )
    parser.add_argument(
        "--num-layers-per-virtual-pipeline-stage", type=int, metavar="N", help="with --to megatron [all of a stage's]"
    )
    return parser

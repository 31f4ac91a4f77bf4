"""What deserves a word is said in one line each; what does not is left in silence."""

import re

import pytest
import torch

from megalith.checkpoint.settings import CheckpointConfig
from megalith.config import Run, known_settings
from megalith.notices import REPLACED, notes, overridden, padding_warning, repeated_warning, warnings_of
from megalith.report import expected_loss
from megalith.sources import read_command_line

SMALL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --micro-batch-size 2 --seq-length 16
    --max-position-embeddings 16 --train-iters 2000 --lr 1e-3 --data-path data --save runs/a --save-interval 100
"""


def run_of(words: str = "") -> Run:
    return read_command_line((SMALL + words).split())


def warned(words: str, num_steps: int = 2000, device_type: str = "cuda") -> list[str]:
    return list(warnings_of(run_of(words), num_steps=num_steps, device_type=device_type))


def test_a_usual_run_is_told_nothing() -> None:
    assert warned("") == []
    assert list(notes(run_of())) == list(notes(run_of("--sequence-parallel --tensor-model-parallel-size 2"))) == []
    assert overridden(run_of()) == []


@pytest.mark.parametrize(
    "words",
    [
        "--sequence-parallel",
        "--checkpoint-num-layers 2",
        "--on-replica-fault warn",
        "--max-restarts 2",
        "--loss-scale 64",
        "--initial-loss-scale 65536",
        "--bf16 --hysteresis 4",
        "--fp16 --loss-scale 1024 --loss-scale-window 100",
        "--lr-decay-style constant --min-lr 1e-6",
        "--spike-window 64",
        "--eval-first --eval-iters 0",
        "--sgd-momentum 0.5",
        "--optimizer sgd --adam-beta2 0.95",
    ],
)
def test_what_changes_nothing_is_told(words: str) -> None:
    (line,) = notes(run_of(words))
    assert re.fullmatch(r"note: --[a-z0-9-]+ changes nothing: .+\.", line) and line.split()[1] in words


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--lr-warmup-fraction 0.1", "--lr-warmup-fraction"),
        ("--lr-warmup-iters 1", "--lr-warmup-iters"),
        ("--train-samples 2 --lr-warmup-samples 1", "--lr-warmup-samples"),
        ("--lr-warmup-iters 1 --lr-warmup-fraction 0", None),
        ("", None),
    ],
)
def test_a_single_step_that_warms_up_is_warned_of(words: str, flag: str | None) -> None:
    given = f"--log-interval 1 --save-interval 1 --eval-iters 0 {words}"
    if "samples" in words:
        given += " --train-iters 0"
    expected = "the one step is the first of the warm-up, at learning rate 0: it changes nothing. "
    expected += "{} 0 leaves the warm-up out."
    assert warned(given, num_steps=1) == ([] if flag is None else [expected.format(flag)])
    assert warned(given, num_steps=2) == []


@pytest.mark.parametrize("interval", ["log", "save", "eval"])
def test_an_interval_longer_than_the_run_is_warned_of(interval: str) -> None:
    (line,) = warned(f"--{interval}-interval 2001")
    assert line.startswith(f"--{interval}-interval = 2001 is longer than the run of 2,000 steps: ")
    assert warned(f"--{interval}-interval 2000") == []


def test_a_run_that_cannot_go_on_is_warned_of_that_alone() -> None:
    run = read_command_line((SMALL.replace("--save runs/a", "") + "--save-interval 5000").split())
    (line,) = warnings_of(run, num_steps=2000, device_type="cpu")
    assert line.startswith("nothing will be saved: --save was not given")


@pytest.mark.parametrize(("words", "steps"), [("", 17), ("--hysteresis 1", 16), ("--initial-loss-scale 131072", 2)])
def test_steps_that_the_initial_loss_scale_will_skip_are_counted(words: str, steps: int) -> None:
    (line,) = warned(f"--fp16 {words}")
    assert f"about {steps} steps will be skipped" in line


@pytest.mark.parametrize("words", ["--fp16 --initial-loss-scale 65536", "--fp16 --loss-scale 1024", "--bf16", ""])
def test_no_skipped_steps_are_foretold_where_none_are_likely(words: str) -> None:
    assert warned(words) == []


@pytest.mark.parametrize("words", ["--bf16", "--fp16 --loss-scale 1024"])
@pytest.mark.parametrize("has_instructions", [True, False])
def test_16_bits_are_warned_of_where_the_processor_has_no_instructions_for_them(
    monkeypatch: pytest.MonkeyPatch, words: str, has_instructions: bool
) -> None:
    for name in ("avx512_bf16", "amx_tile", "amx_fp16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: has_instructions)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    lines = warned(words, device_type="cpu")
    assert len(lines) == (0 if has_instructions else 1)
    assert all(line.startswith(f"{words.split()[0]}: this processor has no instructions") for line in lines)
    assert warned(words) == warned("", device_type="cpu") == []
    monkeypatch.setattr("platform.machine", lambda: "aarch64")  # Nobody tells.
    assert warned(words, device_type="cpu") == []


def test_heads_that_no_even_tensor_size_divides_are_warned_of() -> None:
    (line,) = warned("--hidden-size 1600 --num-attention-heads 25")
    assert line.startswith("--num-attention-heads = 25 can be cut over [5, 25] tensor-parallel ranks only")
    assert warned("--hidden-size 48 --num-attention-heads 6") == []


def test_a_vocabulary_of_padding_is_warned_of() -> None:
    line = padding_warning(run_of("--make-vocab-size-divisible-by 1024"), 258, 1024)
    assert line is not None and "766 of the vocabulary's 1,024 entries" in line and "= 1024 could be smaller" in line
    # GPT-2's, and what the usual multiple can add at most.
    assert padding_warning(run_of(), 50257, 50304) is None
    assert padding_warning(run_of(), 257, 384) is None


def test_training_data_read_more_than_ten_times_is_warned_of() -> None:
    assert repeated_warning("my_text_document", 10) is None
    line = repeated_warning("my_text_document", 13508)
    assert line is not None and line.startswith("my_text_document is repeated 13,508 times")


# A value of its own for each answered setting, where that is no switch.
VALUES = {
    "onnx_safe": "1",
    "lazy_mpu_init": "1",
    "local_rank": "0",
    "DDP_impl": "torch",
    "data_impl": "lazy",
    "num_workers": "4",
    "block_data_path": "blocks",
    "ict_load": "run",
    "ict_head_size": "8",
    "sample_rate": "0.5",
    "adlr_autoresume_interval": "10",
}


@pytest.mark.parametrize("name", sorted(set(REPLACED) - {"distributed_backend"}))
def test_each_answered_argument_is_answered_in_one_line(name: str) -> None:
    flag = known_settings()[name].flag
    assert list(notes(run_of(f"{flag} {VALUES.get(name, '')}"))) == [f"note: {flag} is accepted; {REPLACED[name]}."]


@pytest.mark.parametrize("words", ["--distributed-backend gloo", "--data-impl mmap", "--DDP-impl local"])
def test_values_that_are_done_as_asked_get_no_line(words: str) -> None:
    assert list(notes(run_of(words))) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("t5 --relative-attention-num-buckets 8", "there is no table of distances without --position-embedding-type"),
        ("t5 --relative-attention-max-distance 64", "there is no table of distances without --position-embedding-type"),
        ("vit --split 9,1,0", "the folders train and val part the images."),
        ("vit --vocab-file vocab.txt", "a vit reads no text."),
        ("classify --split 9,1,0", "its samples are those of --train-data and --valid-data."),
    ],
)
def test_an_argument_that_the_task_has_no_use_for_is_answered(words: str, said: str) -> None:
    task, flag, value = words.split()
    usual = SMALL.replace("--data-path data", "") if task == "classify" else SMALL
    run = read_command_line([task, *usual.split(), flag, value])
    lines = list(notes(run))
    assert len(lines) == 1 and lines[0].startswith(f"note: {flag} changes nothing: {said}")


@pytest.mark.parametrize("words", ["--tokenizer-type ByteLevelTokenizer", "--vocab-file nothere.json"])
def test_a_tokenizer_beside_mock_data_is_answered(words: str) -> None:
    run = read_command_line([*SMALL.replace("--data-path data", "--mock-data").split(), *words.split()])
    why = "--mock-data draws from --vocab-size tokens, and reads no text"
    assert list(notes(run)) == [f"note: {words.split()[0]} changes nothing: {why}."]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--log-timers-to-tensorboard", "TensorBoard's files have no place without --tensorboard-dir or --save."),
        ("--tensorboard-log-interval 5", "TensorBoard's files have no place without --tensorboard-dir or --save."),
        ("--profile-step-start 3", "nothing is traced without --profile."),
        ("--tokenizer-model tokenizer.json", "GPT2BPETokenizer does not read it."),
    ],
)
def test_an_argument_without_what_it_serves_is_answered(words: str, said: str) -> None:
    run = read_command_line([*SMALL.replace("--save runs/a", "").split(), *words.split()])
    assert list(notes(run)) == [f"note: {words.split()[0]} changes nothing: {said}"]


@pytest.mark.parametrize(
    "words", ["--log-timers-to-tensorboard", "--profile --profile-step-start 3", "--vocab-file a --merge-file b"]
)
def test_an_argument_with_what_it_serves_gets_no_line(words: str) -> None:
    assert list(notes(run_of(words))) == []


def test_a_table_of_distances_is_made_as_asked() -> None:
    words = "--position-embedding-type relative --relative-attention-num-buckets 8".split()
    assert list(notes(read_command_line(["t5", *SMALL.split(), *words]))) == []


def test_an_argument_of_another_task_is_answered_with_that_task() -> None:
    assert list(notes(run_of("--mask-prob 0.3"))) == [
        "note: --mask-prob belongs to the task bert, t5; it changes nothing for gpt."
    ]


def test_a_default_of_the_task_that_is_overridden_is_said_in_megatron_lms_words() -> None:
    blanks = " " * 24
    assert overridden(run_of("--tokenizer-type ByteLevelTokenizer")) == [
        "WARNING: overriding default arguments for tokenizer_type:GPT2BPETokenizer"
        f"{blanks}with tokenizer_type:ByteLevelTokenizer"
    ]


def test_a_default_of_the_task_that_is_given_is_not_said_to_be_overridden() -> None:
    assert overridden(run_of("--tokenizer-type GPT2BPETokenizer")) == []


def test_every_warning_is_one_sentence_or_two_on_one_line() -> None:
    words = (
        "--fp16 --hidden-size 48 --num-attention-heads 3 --log-interval 9999 --save-interval 9999 --eval-interval 9999"
    )
    lines = warned(words)
    assert len(lines) == 5
    assert all("\n" not in line and line.endswith(".") for line in lines)


@pytest.mark.parametrize(
    ("save", "interval", "said"),
    [
        (
            None,
            None,
            "a kill would cost 25.0 hours on average and up to 50.0: the run takes that long, and there is no --save. "
            "Give --save DIR and --save-interval",
        ),
        ("run", 200_000, "and --save-interval = 200000 is longer. Save more often"),
        ("run", 1000, None),
    ],
)
def test_what_a_kill_would_cost_is_told_in_hours(save: str | None, interval: int | None, said: str | None) -> None:
    told = expected_loss(CheckpointConfig(save=save, save_interval=interval), 100_000, 1.8)
    assert told is None if said is None else said in str(told)
    assert expected_loss(CheckpointConfig(), 10, 1.8) is None


@pytest.mark.parametrize(("length", "is_told"), [("24", True), ("32", False)])
def test_products_that_8_bits_do_not_fit_are_told(length: str, is_told: bool) -> None:
    words = f"--bf16 --fp8-format e4m3 --micro-batch-size 1 --seq-length {length} --max-position-embeddings {length}"
    said = (
        "note: --fp8-format changes nothing: the 24 tokens of a microbatch on a rank are no multiple of 16, as "
        "products in 8 bits need."
    )
    assert (said in list(notes(run_of(words)))) == is_told

"""Flags, run files and presets become one configuration; every fault is found at once."""

import dataclasses
import itertools
import json
import re
import tomllib
from collections.abc import MutableMapping
from pathlib import Path

import pytest

from megalith.check import check
from megalith.config import DISPLACED, RIVALS, ConfigError, Run, compose, known_settings
from megalith.data.tokenizer import KINDS
from megalith.derived import OURS, reference_arguments
from megalith.fields import describe
from megalith.notices import REPLACED
from megalith.parallel.mesh import Layout
from megalith.sources import (
    as_toml,
    flag_parser,
    moved_run_files,
    preset_names,
    read_command_line,
    read_preset,
    write_run_file,
)

# The command line behind Megatron-LM's log of a GPT-2 XL run.
REFERENCE = """
    --num-layers 48 --hidden-size 1600 --num-attention-heads 25 --micro-batch-size 8 --global-batch-size 64
    --seq-length 1024 --max-position-embeddings 1024 --train-iters 1000 --lr-decay-iters 320
    --data-path /workspace/Megatron-LM/my-gpt2_text_document --vocab-file /workspace/Megatron-LM/gpt2-vocab.json
    --merge-file /workspace/Megatron-LM/gpt2-merges.txt --data-impl mmap --split 800,100,100
    --distributed-backend nccl --lr 0.00015 --min-lr 1.0e-5 --lr-decay-style cosine --weight-decay 1e-2
    --clip-grad 1.0 --lr-warmup-fraction .01 --checkpoint-activations --log-interval 1 --save-interval 10000
    --eval-interval 1000 --eval-iters 10 --fp16
""".split()
ONE_RANK = Layout(world_size=1, rank=0, local_rank=0, tensor=1, pipeline=1)
SMALL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --micro-batch-size 2 --seq-length 16
    --max-position-embeddings 16 --train-iters 10 --lr 1e-3 --tokenizer-type ByteLevelTokenizer --data-path data
""".split()


def rules_broken(words: list[str], world_size: int = 1) -> dict[str, str]:
    """Flag -> rule of every fault that a command line has."""
    return {fault.setting: fault.rule for fault in check(read_command_line(words), world_size)}


def test_the_reference_command_line_gives_the_139_values_of_its_log(golden: Path) -> None:
    arguments = json.loads((golden / "arguments.json").read_text())["arguments"]
    values = reference_arguments(read_command_line(REFERENCE), ONE_RANK)
    assert {a["name"]: a["value_in_log"] for a in arguments} == {name: str(value) for name, value in values.items()}
    assert len(values) == 139


def test_every_reference_argument_has_its_flag_type_default_and_choices(golden: Path) -> None:
    document = json.loads((golden / "arguments.json").read_text())
    known = known_settings()
    for argument in document["arguments"]:
        if argument["flag"] in (None, "(none)"):
            continue
        setting = known[argument["name"]]
        described = describe(setting.field)
        assert setting.flag == argument["flag"]
        default = setting.field.default
        assert (list(default) if default == () else default) == argument["default"], argument["name"]
        if argument["type"].startswith("switch"):
            assert described["switch"] == argument["type"].split()[1]
        if argument["type"].startswith("str of") and argument["name"] != "tokenizer_type":
            choices = argument["type"].removeprefix("str of ").split("/")
            # Later versions of the reference have more styles.
            assert list(described["choices"])[: len(choices)] == choices
            assert argument["name"] == "lr_decay_style" or len(described["choices"]) == len(choices)
    assert set(known) - {a["name"] for a in document["arguments"]} == set(OURS)


def test_a_word_in_other_letters_is_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean WSD\?"):
        read_command_line([*SMALL, "--lr-decay-style", "wsd"])


def test_removed_flags_of_the_reference_name_what_took_their_place(golden: Path) -> None:
    for removed in json.loads((golden / "arguments.json").read_text())["removed_after_parsing"]:
        with pytest.raises(ConfigError, match=f"{removed['flag']}: was removed. Use --"):
            read_command_line([*SMALL, removed["flag"], "4"])


def test_all_faults_of_a_command_line_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        read_command_line("--num-layer 3 --lr abc --seq-length 2.5 --lr-decay-style cosin --batch-size 8".split())
    text = str(error.value)
    assert "--num-layer: is not a known flag. Did you mean --num-layers?" in text
    assert "--lr = abc: must be a number." in text
    assert "--seq-length = 2.5: must be a whole number." in text
    assert "--lr-decay-style = cosin: must be one of constant, linear, cosine, " in text
    assert "Did you mean cosine?" in text
    assert "--batch-size: was removed." in text
    assert len(error.value.faults) == 5


def test_a_flag_without_its_value_hides_no_other_fault() -> None:
    with pytest.raises(ConfigError) as error:
        read_command_line("--vocab-file --num-layer 3 --seq-length 2.5 --lr".split())
    assert str(error.value).splitlines() == [
        "--vocab-file: expected one argument. See megalith pretrain --help.",
        "--lr: expected one argument. See megalith pretrain --help.",
        "--num-layer: is not a known flag. Did you mean --num-layers?",
        "--seq-length = 2.5: must be a whole number. Write its digits alone, as in 64000.",
    ]


@pytest.mark.parametrize("word", ["small.toml", "bert"])
def test_a_run_file_or_a_task_behind_a_flag_is_sent_to_the_front(word: str) -> None:
    with pytest.raises(ConfigError, match=f"{word}: is not expected here. Name it in front of all flags."):
        read_command_line(["--preset", "quickstart", word])


def test_abbreviated_flags_are_not_accepted() -> None:
    with pytest.raises(ConfigError, match="--num-attention: is not a known flag"):
        read_command_line([*SMALL, "--num-attention", "4"])


def test_the_settings_are_gathered_once_and_cannot_be_changed() -> None:
    known = known_settings()
    assert known_settings() is known and not isinstance(known, MutableMapping)


def test_a_corrected_spelling_stands_beside_the_misspelt_flag() -> None:
    for flag in ("--no-log-learnig-rate-to-tensorboard", "--no-log-learning-rate-to-tensorboard"):
        assert not read_command_line([*SMALL, flag]).monitor.log_learning_rate_to_tensorboard


def test_later_wins_preset_then_run_file_then_flags(tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text("[optimizer]\nlr = 0.5\nmin_lr = 0.25\n\n[model]\nnum-layers = 3\n")
    run = read_command_line([str(run_file), "--preset", "quickstart", "--lr", "0.125"])
    preset, faults = read_preset("quickstart")
    assert not faults
    assert (run.optimizer.lr, run.optimizer.min_lr, run.model.num_layers) == (0.125, 0.25, 3)
    assert run.model.hidden_size == preset["hidden_size"]


@pytest.mark.parametrize(
    ("words", "gone"),
    [
        ("--lr-warmup-iters 5 --train-iters 50", {"lr_warmup_fraction"}),
        ("--lr-warmup-iters 0", {"lr_warmup_fraction"}),
        ("--train-samples 4000 --lr-warmup-samples 400", {"train_iters", "lr_warmup_fraction"}),
        ("--encoder-seq-length 64", {"seq_length"}),
        ("--data-path text --tokenizer-type ByteLevelTokenizer", {"corpus"}),
        ("--mock-data --vocab-size 50", {"corpus"}),
    ],
)
def test_a_flag_displaces_what_a_preset_says_in_other_words(words: str, gone: set[str]) -> None:
    run = read_command_line(["--preset", "quickstart", *words.split()])
    known = known_settings()
    for name in gone:
        assert getattr(getattr(run, known[name].part), name) == known[name].field.default
    assert check(run, 1) == []


def test_a_flag_displaces_what_a_run_file_says_in_other_words(tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text("[optimizer]\nbf16 = true\n\n[data]\ndata_path = 'a'\ntokenizer_type = 'ByteLevelTokenizer'\n")
    run = read_command_line([str(run_file), "--fp16", "--corpus", "python"])
    assert (run.optimizer.fp16, run.optimizer.bf16) == (True, False)
    assert (run.data.corpus, run.data.data_path, run.data.tokenizer_type) == ("python", None, None)
    run_file.write_text("[parallel]\ncheckpoint_activations = true\n")
    assert not read_command_line(
        [str(run_file), "--recompute-granularity", "selective"]
    ).parallel.checkpoint_activations
    assert read_command_line([str(run_file), "--recompute-granularity", "full"]).parallel.checkpoint_activations
    run_file.write_text("[optimizer]\nfp16 = false\n")
    assert read_command_line([str(run_file), "--bf16"]).optimizer.bf16
    run_file.write_text("[optimizer]\nlr_warmup_iters = 3\nfp16 = false\n[data]\nmock_data = false\n")
    run = read_command_line([str(run_file), "--preset", "quickstart"])
    assert (run.optimizer.lr_warmup_iters, run.optimizer.lr_warmup_fraction, run.data.corpus) == (3, None, "python")


def test_rivals_from_one_source_are_refused(tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text("fp16 = true\nbf16 = true\n")
    assert rules_broken([*SMALL, "--fp16", "--bf16"])["--fp16"] == "contradicts --bf16"
    assert rules_broken([str(run_file), *SMALL])["--fp16"] == "contradicts --bf16"


def test_unknown_names_in_a_run_file_name_the_nearest_known_one(tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        'task = "gtp"\npreset = "quickstart"\n[optimiser]\nlr = 1\n[job]\nlr = 1\n[model]\nnum_layer = 2\n'
        'hidden_size = "wide"\n'
    )
    with pytest.raises(ConfigError) as error:
        read_command_line([str(run_file)])
    text = str(error.value)
    assert "Did you mean optimizer?" in text
    assert "[job]: is not one of the sections model, data, optimizer, parallel, checkpoint, monitor, " in text
    assert 'preset = "quickstart": stands on the command line only. Give --preset NAME behind the file.' in text
    assert "Did you mean num_layers?" in text
    assert 'hidden_size = "wide": must be a whole number' in text
    assert 'task = "gtp": must be one of gpt' in text


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('bf16 = "false"', 'bf16 = "false": must be true or false'),
        ("bf16 = 1", "bf16 = 1: must be true or false"),
        ('onnx_safe = "true"', 'onnx_safe = "true": must be true or false'),
        ('num_layers = "4"', 'num_layers = "4": must be a whole number'),
        ("num_layers = true", "num_layers = true: must be a whole number"),
        ("lr = true", "lr = true: must be a number"),
        ('lr = "1e-3"', 'lr = "1e-3": must be a number'),
        ("lr = [{a = 2020-01-01}]", "lr = [{a = 2020-01-01}]: must be a number"),
        ("save = false", "save = false: must be text"),
        ("data_path = [true]", "data_path = [true]: must be a list of texts or numbers"),
        ('retriever_report_topk_accuracies = ["1"]', 'topk_accuracies = ["1"]: must be whole numbers'),
        (
            'log_format = "ritch"',
            'log_format = "ritch": must be one of auto, reference, rich, json. Did you mean rich?',
        ),
    ],
)
def test_a_run_file_says_numbers_and_truths_without_quotes(tmp_path: Path, line: str, told: str) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(f"{line}\n")
    with pytest.raises(ConfigError) as error:
        read_command_line([str(run_file)])
    assert told in str(error.value)


def test_a_flag_that_megatron_reads_as_true_whatever_it_says_is_read_so() -> None:
    assert read_command_line([*SMALL, "--onnx-safe", "false"]).model.onnx_safe is True


@pytest.mark.parametrize("text", ["[model", "\x00"])
def test_a_broken_run_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.toml: is not valid TOML"):
        read_command_line([str(run_file)])
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read \(No such file"):
        read_command_line([str(tmp_path / "none.toml")])


def test_a_run_file_written_from_a_run_gives_the_same_run(tmp_path: Path) -> None:
    run = read_command_line([*REFERENCE, "--save", 'odd "name"\\\n', "--rampup-batch-size", "8", "8", "64"])
    (tmp_path / "run.toml").write_text(as_toml(run))
    assert read_command_line([str(tmp_path / "run.toml")]) == run


def test_a_run_file_keeps_every_character() -> None:
    """Of each block of Unicode some, and of the first ones all; halves of pairs are no characters."""
    codes = {*range(1, 0x3000), *range(0x3000, 0x110000, 61), 0x2028, 0xFEFF, 0xFFFF, 0x1F600, 0xE0001, 0x10FFFF}
    characters = "".join(chr(code) for code in sorted(codes) if not 0xD800 <= code <= 0xDFFF)
    words = [characters[start : start + 1000] for start in range(0, len(characters), 1000)]
    for word in [*words, 'a"b\\c\td', "\\u0041", "\x7f\x85", ""]:
        run = read_command_line([*SMALL, f"--save={word}"])
        assert tomllib.loads(as_toml(run))["checkpoint"]["save"] == word


@pytest.mark.parametrize("flag", ["--save", "--tensorboard-dir", "--profile-dir", "--data-cache-path"])
def test_a_directory_without_a_name_is_not_the_current_one(flag: str) -> None:
    assert rules_broken([*SMALL, "--save", "run", "--save-interval", "5", f"{flag}="]) == {flag: "is empty"}


def test_of_two_run_files_or_tasks_none_is_left_out_without_a_word(tmp_path: Path) -> None:
    for name in ("a.toml", "b.toml"):
        (tmp_path / name).write_text("num_layers = 2\n")
    first, second = str(tmp_path / "a.toml"), str(tmp_path / "b.toml")
    with pytest.raises(ConfigError, match=r"b\.toml: is a second run file, beside .*a\.toml\. Give one"):
        read_command_line([first, second, *SMALL])
    with pytest.raises(ConfigError, match=r"^bert: is a second task, beside gpt\. Give one"):
        read_command_line(["gpt", first, "bert", *SMALL])


@pytest.mark.parametrize("flag", ["--save", "--load", "--data-path", "--sample-prompt"])
def test_bytes_that_are_no_text_are_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} = e7\udcff\udcfe: is not valid UTF-8. Rename"):
        read_command_line([*SMALL, flag, "e7\udcff\udcfe"])
    with pytest.raises(ConfigError, match=f"{flag} = .*: cannot be read in this locale. Set PYTHONUTF8=1"):
        read_command_line([*SMALL, flag, "é".encode().decode("ascii", "surrogateescape")])


def test_every_preset_can_start() -> None:
    assert "quickstart" in preset_names()
    for name in preset_names():
        run = read_command_line(["--preset", name])
        missing = (
            {"--data-path", "--vocab-file", "--merge-file", "--tokenizer-model"} if run.data.corpus is None else set()
        )
        assert {fault.setting for fault in check(run, 1)} <= missing, name


def test_the_small_run_has_no_fault() -> None:
    assert rules_broken(SMALL) == {}


@pytest.mark.parametrize(
    ("words", "size"),
    [("--train-samples 3 --global-batch-size 4", 4), ("--train-samples 1 --rampup-batch-size 2 2 8", 2)],
)
def test_a_length_without_a_whole_step_is_told_with_the_other_faults(words: str, size: int) -> None:
    small = " ".join(SMALL).replace("--train-iters 10", words).split()
    broken = rules_broken([*small, "--global-batch-size", "4", "--hysteresis", "0"])
    assert broken["--train-samples"] == f"is too short for one step of {size} samples"
    assert set(broken) == {"--train-samples", "--hysteresis"}


@pytest.mark.parametrize("fraction", ["-0.1", "1"])
def test_the_remedy_for_a_warm_up_fits_both_ends_of_its_range(fraction: str) -> None:
    faults = check(read_command_line([*SMALL, "--lr-warmup-fraction", fraction]), 1)
    assert [(fault.setting, fault.remedy) for fault in faults] == [("--lr-warmup-fraction", "Give such a number")]


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--nproc 2 --max-restarts 1 --no-auto-resume --save run --save-interval 5", "--max-restarts"),
        ("--num-attention-heads 5", "--hidden-size"),
        ("--encoder-seq-length 8", "--encoder-seq-length"),
        ("--seq-length 17", "--seq-length"),
        ("--decoder-seq-length 17", "--decoder-seq-length"),
        ("--min-lr 2e-3", "--min-lr"),
        ("--save run", "--save-interval"),
        ("--fp16 --bf16", "--fp16"),
        ("--fp16-lm-cross-entropy", "--fp16-lm-cross-entropy"),
        ("--fp32-residual-connection", "--fp32-residual-connection"),
        ("--distribute-checkpointed-activations", "--distribute-checkpointed-activations"),
        ("--train-samples 100", "--train-samples"),
        ("--lr-decay-samples 5", "--lr-decay-samples"),
        ("--rampup-batch-size 2 2 8", "--rampup-batch-size"),
        ("--lr-warmup-fraction 0.1 --lr-warmup-iters 2", "--lr-warmup-iters"),
        ("--lr-warmup-iters 10", "--lr-warmup-iters"),
        ("--lr-warmup-init 1", "--lr-warmup-init"),
        ("--lr-warmup-init -1", "--lr-warmup-init"),
        ("--lr-decay-style WSD", "--lr-wsd-decay-iters"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 0", "--lr-wsd-decay-iters"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 8 --lr-warmup-iters 3", "--lr-wsd-decay-iters"),
        ("--lr-decay-style WSD --lr-wsd-decay-samples 8", "--lr-wsd-decay-samples"),
        ("--global-batch-size 3", "--global-batch-size"),
        ("--num-layers-per-virtual-pipeline-stage 1", "--num-layers-per-virtual-pipeline-stage"),
        ("--override-lr-scheduler --use-checkpoint-lr-scheduler", "--override-lr-scheduler"),
        ("--seed 0", "--seed"),
        ("--hidden-dropout 1", "--hidden-dropout"),
        ("--hysteresis 0", "--hysteresis"),
        ("--min-loss-scale 1e12", "--min-loss-scale"),
        ("--finetune", "--finetune"),
        ("--split a,b", "--split"),
        ("--lr inf", "--lr"),
        ("--clip-grad nan", "--clip-grad"),
        ("--adam-eps 0", "--adam-eps"),
        ("--layernorm-epsilon nan", "--layernorm-epsilon"),
        ("--layernorm-epsilon -1", "--layernorm-epsilon"),
        ("--init-method-std -1", "--init-method-std"),
        ("--fp16 --initial-loss-scale inf", "--initial-loss-scale"),
        ("--seed 4294967296", "--seed"),
        ("--join-timeout nan", "--join-timeout"),
        ("--join-timeout inf", "--join-timeout"),
        ("--hang-timeout 1e30", "--hang-timeout"),
        ("--hang-timeout 0.5", "--hang-timeout"),
        ("--stop-grace nan", "--stop-grace"),
        ("--hidden-size 4 --num-attention-heads 9999999999999999999", "--num-attention-heads"),
        ("--num-layers 9999999999999999999", "--num-layers"),
        ("--max-position-embeddings 9999999999999999999", "--max-position-embeddings"),
        ("--norm-after-residual", "--norm-after-residual"),
        ("--rampup-batch-size ² 2 8", "--rampup-batch-size"),
        ("--split 0,0,0", "--split"),
        ("--data-path 0.5 a 0.5", "--data-path"),
        ("--tokenizer-type GPT2BPETokenizer", "--vocab-file"),
        ("--tokenizer-type Nonsense", "--tokenizer-type"),
        ("--micro-batch-size 0", "--micro-batch-size"),
    ],
)
def test_each_rule_is_broken_by_name(words: str, flag: str) -> None:
    assert flag in rules_broken([*SMALL, *words.split()])


@pytest.mark.parametrize(
    ("words", "flag"),
    [("--train-iters -5", "--train-iters"), ("--lr -1", "--lr"), ("--lr nan", "--lr"), ("--seed -1", "--seed")],
)
def test_one_mistake_is_one_fault(words: str, flag: str) -> None:
    assert set(rules_broken([*SMALL, *words.split()])) == {flag}


def test_kept_inputs_are_shared_out_with_either_name_of_full_recomputation() -> None:
    words = [*SMALL, "--recompute-granularity", "full", "--distribute-checkpointed-activations"]
    assert "--distribute-checkpointed-activations" not in rules_broken(words)


def test_a_run_file_does_not_start_another_run_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = read_command_line([*SMALL, "--save", "runs/a", "--save-interval", "5"])
    write_run_file(run)
    words = ["runs/a/run.toml"]
    assert moved_run_files(words, run) == []
    (tmp_path / "runs" / "a" / "checkpoints").mkdir()
    assert moved_run_files(words, run) == []
    monkeypatch.chdir(tmp_path / "runs")
    (fault,) = moved_run_files(["a/run.toml"], run)
    assert "lies in a run directory" in fault.rule and "--save DIR" in fault.remedy
    assert moved_run_files(["a/run.toml", "--save", "b"], run) == []


def test_zero_turns_off_what_megatron_asks_only_for_truth() -> None:
    words = [*SMALL, *"--loss-scale 0 --exit-interval 0 --exit-duration-in-mins 0".split()]
    run = read_command_line(words)
    assert run.optimizer.loss_scale is run.train.exit_interval is run.train.exit_duration_in_mins is None
    assert rules_broken(words) == {}
    assert set(rules_broken([*SMALL, "--save-interval", "0"])) == {"--save-interval"}


def test_a_directory_of_megatrons_checkpoints_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("6")
    words = [*SMALL, "--load", str(tmp_path), "--save", f"{tmp_path}/", "--save-interval", "5"]
    faults = check(read_command_line(words), 1)
    assert [fault.setting for fault in faults] == ["--load"]
    assert f"megalith convert --from megatron {tmp_path} --to RUN_DIR" in faults[0].remedy


def test_the_model_must_fit_the_ranks() -> None:
    faults = check(read_command_line([*SMALL, "--tensor-model-parallel-size", "3"]), 4)
    fault = next(f for f in faults if f.setting == "--tensor-model-parallel-size")
    assert "does not divide the 4 ranks" in fault.rule
    assert "[1, 2, 4]" in fault.remedy


def test_every_required_setting_is_named_when_nothing_is_given() -> None:
    assert {
        "--num-layers",
        "--hidden-size",
        "--num-attention-heads",
        "--max-position-embeddings",
        "--micro-batch-size",
        "--seq-length",
        "--lr",
        "--train-iters",
        "--data-path",
    } <= set(rules_broken([]))


def test_help_shows_every_flag_with_its_default() -> None:
    text = flag_parser().format_help()
    for known in known_settings().values():
        assert known.flag in text
    assert "[steps; default 1000]" in text


def test_help_names_what_is_taken_where_nothing_is_given() -> None:
    text = " ".join(flag_parser().format_help().split())
    assert "or ByteLevelTokenizer [default GPT2BPETokenizer for gpt, else BertWordPieceLowerCase]" in text
    assert "samples per update [sequences; default " in text


def test_help_of_what_something_else_answers_says_accepted() -> None:
    for name, known in known_settings().items():
        assert ("(accepted; " in describe(known.field)["help"]) == (name in REPLACED), name


def test_help_of_a_switch_that_turns_off_says_so() -> None:
    turned_off = ("do not ", "do without ", "leave ", "refuse ", "no ", "the erf form ", "send whole ")
    for name, known in known_settings().items():
        described = describe(known.field)
        assert described["switch"] != "off" or described["help"].startswith(turned_off), name


def test_help_names_every_tokenizer() -> None:
    named = describe(known_settings()["tokenizer_type"].field)["help"]
    assert set(re.findall(r"\w+", named)) - {"or"} == set(KINDS)


def test_a_run_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        compose("gpt", {}).task = "bert"  # type: ignore[misc]
    assert isinstance(compose("gpt", {}), Run)


def test_every_rival_is_a_setting() -> None:
    displacing = [key if isinstance(key, str) else key[0] for key in DISPLACED]
    named = [*itertools.chain(*RIVALS), *displacing, *itertools.chain(*DISPLACED.values())]
    assert set(named) <= known_settings().keys()


def test_every_setting_of_our_own_is_listed_once_and_exists() -> None:
    # A name that stands there twice, after two merges, would stop every run at its start.
    assert len(set(OURS)) == len(OURS) and set(OURS) <= known_settings().keys()

"""Who comes from nanoGPT, Hugging Face's Trainer, Lightning or torchtitan is told what a setting is called here."""

import re
from pathlib import Path

import pytest

from megalith.cli import main
from megalith.config import ConfigError, known_settings
from megalith.elsewhere import names_elsewhere, plain, remedies
from megalith.sources import read_command_line, read_flags


def test_names_elsewhere_are_none_of_ours_and_lead_to_what_exists() -> None:
    known = known_settings()
    ours = {plain(flag) for setting in known.values() for flag in setting.flags}
    assert not ours & (set(names_elsewhere()) | set(remedies()))
    assert not set(names_elsewhere()) & set(remedies())
    assert set(names_elsewhere().values()) <= set(known)
    flags = {flag for setting in known.values() for flag in setting.flags} | {"--preset", "--ranks", "--version"}
    assert {flag for remedy in remedies().values() for flag in re.findall(r"--[a-z0-9-]+", remedy)} <= flags


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("--learning_rate", "--lr?"),
        ("--learning-rat", "--lr?"),
        ("--batch_size", "--micro-batch-size?"),
        ("--training.local_batch_size", "--micro-batch-size?"),
        ("--block_size", "--seq-length?"),
        ("--n_layer", "--num-layers?"),
        ("--num_layers", "--num-layers?"),
        ("--n_embd", "--hidden-size?"),
        ("--max_iters", "--train-iters?"),
        ("--out_dir", "--save?"),
        ("--grad_clip", "--clip-grad?"),
        ("--gpus", "Use --nproc for this machine"),
        ("--num_train_epochs", "Use --train-iters or --train-samples"),
        ("--gradient_accumulation_steps", "Use --global-batch-size"),
        ("--resume_from_checkpoint", "Leave it out: the same command goes on"),
        ("--micro-batch-siz", "--micro-batch-size?"),
        ("--num-layer", "--num-layers?"),
        ("--qqq", "See megalith pretrain --help"),
    ],
)
def test_a_flag_of_another_program_is_answered_by_ours(typed: str, told: str) -> None:
    for words in ([typed, "3"], [f"{typed}=3"]):
        _, faults = read_flags(words)
        assert [told in str(fault) for fault in faults] == [True]


def test_a_key_of_another_program_in_a_run_file_is_answered_by_ours(tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text("[model]\nn_embd = 64\n[optimizer]\nlearning_rate = 1\n[train]\nepochs = 2\n")
    with pytest.raises(ConfigError) as error:
        read_command_line([str(run_file)])
    told = str(error.value).splitlines()
    assert told[0].endswith("Did you mean hidden_size?")
    assert told[1].endswith("Did you mean lr?")
    assert told[2].endswith("Use --train-iters or --train-samples, which count steps or sequences.")


@pytest.mark.parametrize("words", [["--bf16", "true"], ["--bf16=false"], ["--use-distributed-optimizer", "1"]])
def test_a_value_of_a_flag_that_takes_none_is_refused_beside_all_other_faults(words: list[str]) -> None:
    _, faults = read_flags([*words, "--lr", "x"])
    assert [fault.rule for fault in faults] == ["takes no value", "must be a number"]


@pytest.mark.parametrize(
    ("word", "told"),
    [("version", "--version?"), ("sample", "generate?"), ("eval", "evaluate?"), ("trian", "pretrain?")],
)
def test_a_command_of_another_program_is_answered_by_ours(
    word: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2
    assert capsys.readouterr().err.rstrip().endswith(told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("generate RUN --start Once", "--prompt?"),
        ("generate RUN --max_tokens 3", "--max-new-tokens?"),
        ("generate RUN --max_new_token 3", "--max-new-tokens?"),
        ("generate RUN --out_dir there", "run's directory without a flag."),
        ("evaluate RUN --data there", "--file?"),
        ("preprocess --input a --output b --tokenizer_name c", "--output-prefix?"),
        ("preprocess --input a --output-prefix b --num_proc 3", "--workers?"),
        ("generate RUN --qqq", "see megalith generate --help"),
    ],
)
def test_a_flag_of_another_program_is_answered_by_a_commands_own(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err.strip().endswith(told)

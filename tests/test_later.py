"""Flags of Megatron-LM's later versions are understood, or refused with what to do instead."""

import re

import pytest

from megalith.config import REMOVED, ConfigError, known_settings
from megalith.later import RULE, later_flags, remedy_of
from megalith.sources import read_flags

OURS = {flag for known in known_settings().values() for flag in known.flags}


def test_no_flag_of_megalith_is_called_one_of_later_versions() -> None:
    assert not [flag for flag in OURS | set(REMOVED) if remedy_of(flag)]
    names = [flag for flag, _ in later_flags()]
    assert len(names) > 150 and len(set(names)) == len(names)


def test_what_is_said_to_use_instead_exists() -> None:
    """But for what the flag's own remedy names as the launcher's or of another command."""
    for flag, remedy in later_flags():
        named = set(re.findall(r"--[a-z0-9-]+", remedy))
        assert named <= OURS | {"--nproc"}, flag


@pytest.mark.parametrize(
    ("flag", "setting", "value"),
    [
        ("--use-distributed-optimizer", "data_parallel_sharding", "optimizer"),
        ("--use-torch-fsdp2", "data_parallel_sharding", "parameters"),
        ("--recompute-activations", "recompute_granularity", "selective"),
        ("--distribute-saved-activations", "distribute_checkpointed_activations", True),
        ("--override-opt_param-scheduler", "override_lr_scheduler", True),
        ("--use-checkpoint-opt_param-scheduler", "use_checkpoint_lr_scheduler", True),
    ],
)
def test_flags_that_mean_the_same_are_understood(flag: str, setting: str, value: object) -> None:
    assert read_flags([flag]) == ({setting: value}, [])


def test_a_script_of_later_versions_is_answered_in_one_round() -> None:
    words = "--use-flash-attn --transformer-impl local --moe-router-topk=2 --recompute-method uniform --num-layer 3"
    _, faults = read_flags([*words.split(), "--lr", "abc"])
    told = ConfigError(faults).args[0].splitlines()
    assert [line.split(":")[0] for line in told] == [
        *("--use-flash-attn", "--transformer-impl", "--moe-router-topk", "--recompute-method", "--num-layer"),
        "--lr = abc",
    ]
    assert all(RULE in line for line in told[:4])
    assert told[3].endswith("Leave it out: layers are recomputed in chunks of --checkpoint-num-layers, "
                            "which is the method uniform.")  # fmt: skip
    assert told[4] == "--num-layer: is not a known flag. Did you mean --num-layers?"

"""megalith convert: Megatron-LM's checkpoints into run directories and back, bit for bit; bad files are refused."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalith.checkpoint import foreign
from megalith.checkpoint.directory import list_checkpoints
from megalith.checkpoint.verify import read_index
from megalith.convert import main
from megalith.train import train
from megalith.trained import run_of
from tests.checkpoint.forked_reader import forked_reader
from tests.checkpoint.megatron_files import VOCABULARY, Case, whole_tensors, write_checkpoint
from tests.checkpoint.test_foreign import Payload
from tests.layouts.runs import configured, run_on, steps_of, weights_of, write_data
from tests.ranks import run_ranks

__all__ = ["forked_reader"]

CASES = [
    Case(),
    Case(dtype=torch.float32),
    Case(tensor=2, dtype=torch.bfloat16),
    Case(stages=2, by_apex=True),
    Case(tensor=2, stages=2),
    Case(tensor=2, stages=2, chunks=2, dtype=torch.float32),
]
OURS = {
    "word": "word_embedding.weight",
    "position": "position_embedding.weight",
    "input_layernorm": "attention_norm",
    "self_attention.query_key_value": "attention.qkv",
    "self_attention.dense": "attention.out",
    "post_attention_layernorm": "feedforward_norm",
    "mlp.dense_h_to_4h": "feedforward.up",
    "mlp.dense_4h_to_h": "feedforward.down",
    "final_layernorm": "final_norm",
}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--to huggingface run out --tensor-model-parallel-size 2", "--tensor-model-parallel-size: nothing reads it"),
        ("--to megatron run out --weights-only --vocab-file v", "--vocab-file, --weights-only: nothing reads it with"),
        ("--from huggingface there --to run --iteration 3", "--iteration: nothing reads it with --from huggingface"),
    ],
)
def test_a_flag_that_a_conversion_does_not_read_is_refused(words: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        main(words.split())


def our_tensors() -> dict[str, Tensor]:
    """The tensors of a run directory that the whole tensors become."""
    tensors: dict[str, Tensor] = {}
    for theirs, kinds in whole_tensors().items():
        name = theirs
        for old, new in OURS.items():
            name = name.replace(old, new)
        tensors |= {f"{'weight' if kind == 'main' else kind}.{name}": tensor for kind, tensor in kinds.items()}
    return tensors


def load(path: Path) -> Any:
    """The objects in a file."""
    return foreign._load(path)


def assert_same_where_both_have_it(found: Any, expected: Any, where: str) -> None:
    """Everything expected is found, tensors bit for bit and of the same type."""
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    elif isinstance(expected, dict):
        for key, value in expected.items():
            assert key in found, f"{where}/{key}"
            assert_same_where_both_have_it(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_same_where_both_have_it(found[number], value, f"{where}[{number}]")
    else:
        assert found == expected, where


def from_megatron(source: Path, target: Path, *words: str) -> int:
    return main(["--from", "megatron", str(source), "--to", str(target), *words])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_megatron_checkpoint_comes_back_from_ours_bit_for_bit(
    case: Case, tmp_path: Path, forked_reader: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "theirs", case)
    assert from_megatron(tmp_path / "theirs", tmp_path / "run") == 0
    ours = weights_of(tmp_path / "run")
    expected = our_tensors()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    cut = ["--tensor-model-parallel-size", str(case.tensor), "--pipeline-model-parallel-size", str(case.stages)]
    if case.chunks > 1:
        cut += ["--num-layers-per-virtual-pipeline-stage", str(4 // case.stages // case.chunks)]
    assert main(["--to", "megatron", str(tmp_path / "run"), str(tmp_path / "back"), *cut]) == 0
    assert f"start Megatron-LM with --load {tmp_path / 'back'} {' '.join(cut)} --make-vocab" in capsys.readouterr().out
    assert (tmp_path / "back" / "latest_checkpointed_iteration.txt").read_text() == "40"
    files = sorted((tmp_path / "theirs").rglob("*.pt"))
    assert len(files) == case.tensor * case.stages
    for path in files:
        theirs, back = load(path), load(tmp_path / "back" / path.relative_to(tmp_path / "theirs"))
        for name, value in vars(theirs["args"]).items():
            if name != "save":
                assert getattr(back["args"], name) == value, name
        # Where torch's Adam counts its steps by parameter, and generators, which ours has none of.
        for name in ("args", "random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state"):
            del theirs[name]
        del theirs["rng_tracker_states"]
        inner = theirs["optimizer"].get("optimizer", theirs["optimizer"])
        for group in inner["param_groups"]:
            assert group.pop("lr") == 1e-5
        assert_same_where_both_have_it(back, theirs, path.parent.name)


def test_everything_else_that_a_run_goes_on_from_is_taken_over(tmp_path: Path, forked_reader: None) -> None:
    write_checkpoint(tmp_path / "theirs", Case(tensor=2))
    assert from_megatron(tmp_path / "theirs", tmp_path / "run") == 0
    state = read_index(list_checkpoints(tmp_path / "run")[-1].path).state
    expected = {
        "step": 40,
        "consumed_train_samples": 320,
        "consumed_valid_samples": 16,
        "schedule_samples": 200,
        "skipped_steps": 15,
        "num_updates": 25,
        "loss_scale": {"scale": 65536.0, "clean_steps": 24, "tolerance": -13},
        "schedule": {"max_lr": 1.5e-4, "min_lr": 1e-5, "warmup": 16.0, "decay": 160, "style": "cosine"},
    }
    assert {name: state[name] for name in expected} == expected
    run = run_of(str(tmp_path / "run"))
    assert run.data.data_path == ("/data/my-gpt2_text_document",)
    assert (run.train.train_iters, run.optimizer.lr, run.data.split) == (100, 1.5e-4, "800,100,100")
    assert (run.parallel.tensor_model_parallel_size, run.checkpoint.save) == (1, str(tmp_path / "run"))
    # On two tensor ranks a multiple of 4 pads to multiples of 8; here it is 8 on any layout.
    assert run.model.make_vocab_size_divisible_by == 8


def test_a_checkpoint_too_old_to_count_samples_has_drawn_what_its_iteration_says(
    tmp_path: Path, forked_reader: None
) -> None:
    write_checkpoint(tmp_path / "theirs", Case())

    def age(contents: Any) -> None:
        del contents["args"].consumed_train_samples, contents["args"].consumed_valid_samples
        contents["args"].eval_interval, contents["args"].eval_iters = 16, 3

    edit(tmp_path / "theirs", age)
    assert from_megatron(tmp_path / "theirs", tmp_path / "run") == 0
    state = read_index(list_checkpoints(tmp_path / "run")[-1].path).state
    assert (state["consumed_train_samples"], state["consumed_valid_samples"]) == (40 * 8, 2 * 3 * 8)
    edit(tmp_path / "theirs", lambda contents: delattr(contents["args"], "global_batch_size"))
    with pytest.raises(ValueError, match="its arguments have neither consumed_train_samples nor global_batch_size"):
        from_megatron(tmp_path / "theirs", tmp_path / "again")


TRAIN = ["--lr-decay-iters", "20", "--fp32-residual-connection", "--bf16", "--hidden-dropout", "0.1"]


def test_a_run_that_went_through_megatrons_files_goes_on_as_if_it_had_not(tmp_path: Path, forked_reader: None) -> None:
    data = write_data(tmp_path)
    assert run_on(1, ["--train-iters", "4", *TRAIN], tmp_path / "run", data) == 0
    cut = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    assert main(["--to", "megatron", str(tmp_path / "run"), str(tmp_path / "theirs"), *cut]) == 0
    assert from_megatron(tmp_path / "theirs", tmp_path / "again") == 0
    before = weights_of(tmp_path / "run")
    for name, tensor in weights_of(tmp_path / "again").items():
        assert torch.equal(tensor, before[name]), name
    for name in ("run", "again"):
        assert run_on(1, ["--train-iters", "6", *TRAIN], tmp_path / name, data) == 0
    straight, converted = weights_of(tmp_path / "run"), weights_of(tmp_path / "again")
    assert any(not torch.equal(straight[name], before[name]) for name in straight)
    for name, tensor in straight.items():
        assert torch.equal(converted[name], tensor), name


def go_on(rank: int, *, words: list[str]) -> int:
    return train(configured(rank, 1, words), started=0.0)


def test_a_converted_run_takes_its_next_step_from_its_run_file(tmp_path: Path, forked_reader: None) -> None:
    write_checkpoint(tmp_path / "theirs", Case(tensor=2, stages=2))
    assert from_megatron(tmp_path / "theirs", tmp_path / "run") == 0
    changed = ["--data-path", str(write_data(tmp_path)), "--eval-iters", "0", "--device", "cpu", "--log-interval", "1"]
    words = [str(tmp_path / "run" / "run.toml"), *changed, "--exit-interval", "41", "--log-format", "json"]
    assert run_ranks(partial(go_on, words=words), 1, timeout=120) == [0]
    steps = steps_of(tmp_path / "run")
    assert [(step["step"], step["loss_scale"]) for step in steps] == [(41, 65536.0)]
    before, after = our_tensors(), weights_of(tmp_path / "run")
    # One of Adam's steps at the floor of the rate moves a weight by about that, and its first moment by a tenth.
    name = "layers.2.feedforward.up.weight"
    moved = (after[f"weight.{name}"] - before[f"weight.{name}"]).abs().max()
    assert 0 < float(moved) < 1e-3
    nearer = after[f"exp_avg.{name}"] / before[f"exp_avg.{name}"]
    assert float((nearer - 0.9).abs().median()) < 0.1


def test_arguments_are_megatrons_139_and_those_it_adds_later(golden: Path, tmp_path: Path, forked_reader: None) -> None:
    write_checkpoint(tmp_path / "theirs", Case(tensor=2, stages=2))
    assert from_megatron(tmp_path / "theirs", tmp_path / "run") == 0
    assert main(["--to", "megatron", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    written = vars(load(tmp_path / "back" / "iter_0000040" / "mp_rank_00" / "model_optim_rng.pt")["args"])
    known = json.loads((golden / "arguments.json").read_text())["arguments"]
    extra = json.loads((golden / "checkpoint_tree.json").read_text())["args_extra_vs_log"]
    assert written.keys() == {entry["name"] for entry in known} | set(extra)
    assert (written["params_dtype"], written["padded_vocab_size"]) == (torch.float16, VOCABULARY)
    assert (written["world_size"], written["tensor_model_parallel_size"], written["iteration"]) == (1, 1, 40)


def edit(directory: Path, change: Any, *, rank: str = "mp_rank_00") -> None:
    path = directory / "iter_0000040" / rank / "model_optim_rng.pt"
    contents = load(path)
    change(contents)
    torch.save(contents, path)


def test_weights_of_a_release_are_taken_without_an_optimizer(
    tmp_path: Path, forked_reader: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the names of the first versions, and the QKV rows of version 0."""
    source = tmp_path / "theirs"
    write_checkpoint(source, Case())

    def age(contents: Any) -> None:
        for name in ("optimizer", "lr_scheduler", "checkpoint_version"):
            del contents[name]
        language_model = contents["model"]["language_model"]
        old = {}
        for name, tensor in language_model.pop("encoder").items():
            if "query_key_value" in name:
                tensor = tensor.view(4, 3, 2, -1).transpose(0, 1).reshape(tensor.shape)
            old[name.replace("self_attention", "attention")] = tensor
        language_model["transformer"] = old

    edit(source, age)
    (source / "iter_0000040").rename(source / "release")
    (source / "latest_checkpointed_iteration.txt").write_text("release")
    assert from_megatron(source, tmp_path / "run") == 0
    assert "weights only" in capsys.readouterr().out
    expected = {name: tensor for name, tensor in our_tensors().items() if name.startswith("weight.")}
    ours = weights_of(tmp_path / "run")
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor.half().float()), name
    assert list_checkpoints(tmp_path / "run")[-1].step == 0


def test_a_payload_is_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    """By the real process."""
    source, canary = tmp_path / "theirs", tmp_path / "canary"
    write_checkpoint(source, Case())
    edit(source, lambda contents: vars(contents["args"]).update(lr=Payload(os.system, f"touch {canary}")))
    canary.unlink(missing_ok=True)  # this test's own reading and writing may not have made it
    with pytest.raises(ValueError, match=r"mp_rank_00/model_optim_rng\.pt was refused: it holds posix\.system"):
        from_megatron(source, tmp_path / "run")
    assert not canary.exists()
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["model"]["language_model"]["encoder"].update(
                {"layers.1.mlp.dense_h_to_4h.weight": torch.zeros(3, 8)}
            ),
            r"mp_rank_01.*: model/language_model/encoder/layers\.1\.mlp\.dense_h_to_4h\.weight has the shape \[3, 8\], "
            r"expected \[16, 8\]",
        ),
        (
            lambda c: c["model"]["language_model"]["embedding"]["word_embeddings"].update(weight=torch.zeros(131, 8)),
            r"mp_rank_01.*: model/language_model/embedding/word_embeddings/weight has the shape \[131, 8\], "
            r"expected \[132, 8\]",
        ),
        (lambda c: c.update(iteration=39), r"mp_rank_01.*: iteration is 39, but 40 in the first file"),
        (lambda c: c.update(optimizer=[]), r"mp_rank_01.*: optimizer is of a layout that is not known"),
        (lambda c: c["optimizer"].update(fp32_from_fp16_params=3), r"mp_rank_01.*: is not laid out as Megatron-LM's"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(change: Any, message: str, tmp_path: Path, forked_reader: None) -> None:
    write_checkpoint(tmp_path / "theirs", Case(tensor=2))
    edit(tmp_path / "theirs", change, rank="mp_rank_01")
    with pytest.raises(ValueError, match=message):
        from_megatron(tmp_path / "theirs", tmp_path / "run")
    assert list_checkpoints(tmp_path / "run") == []


def test_missing_and_truncated_files_are_named(tmp_path: Path, forked_reader: None) -> None:
    source = tmp_path / "theirs"
    write_checkpoint(source, Case(tensor=2, stages=2))
    path = source / "iter_0000040" / "mp_rank_01_001" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"mp_rank_01_001/model_optim_rng\.pt (cannot be read|was refused)"):
        from_megatron(source, tmp_path / "run")
    path.unlink()
    with pytest.raises(ValueError, match=r"mp_rank_01_001/model_optim_rng\.pt: is missing"):
        from_megatron(source, tmp_path / "run")
    with pytest.raises(ValueError, match=r"iter_0000007: is not a directory.*iter_0000040"):
        from_megatron(source, tmp_path / "run", "--iteration", "7")
    (source / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(ValueError, match=r"must hold an iteration or the word release, found '\.\./\.\./etc'"):
        from_megatron(source, tmp_path / "run")
    shutil.rmtree(source)
    with pytest.raises(ValueError, match=r"latest_checkpointed_iteration\.txt: does not exist"):
        from_megatron(source, tmp_path / "run")


def test_copies_that_differ_are_announced_and_the_first_is_taken(
    tmp_path: Path, forked_reader: None, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(stages=2, dtype=torch.float32)
    write_checkpoint(tmp_path / "theirs", case)
    edit(
        tmp_path / "theirs",
        lambda c: c["model"]["word_embeddings_for_head"]["weight"].add_(0.25),
        rank="mp_rank_00_001",
    )
    assert from_megatron(tmp_path / "theirs", tmp_path / "run") == 0
    assert "note: 1 copies differ from the first of their kind, by up to 0.25" in capsys.readouterr().out
    assert torch.equal(weights_of(tmp_path / "run")["weight.word_embedding.weight"], whole_tensors()["word"]["main"])


@pytest.mark.parametrize("data", [["text_document"], None], ids=["data", "none"])
def test_the_command_that_is_named_to_go_on_is_whole(
    data: list[str] | None, tmp_path: Path, forked_reader: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "theirs", Case())
    edit(tmp_path / "theirs", lambda c: vars(c["args"]).update(data_path=data))
    assert from_megatron(tmp_path / "theirs", tmp_path / "run") == 0
    command = f"go on with: megalith pretrain {tmp_path}/run/run.toml{'' if data else ' --data-path PREFIX'}"
    assert command in capsys.readouterr().out.splitlines()


def test_a_tokenizer_that_is_not_at_hand_is_asked_for(tmp_path: Path, forked_reader: None) -> None:
    write_checkpoint(tmp_path / "theirs", Case())
    edit(
        tmp_path / "theirs",
        lambda c: vars(c["args"]).update(tokenizer_type="GPT2BPETokenizer", vocab_file="/gone/vocab.json"),
    )
    with pytest.raises(
        ValueError, match=r"its tokenizer is needed: .*Name its files with --vocab-file and --merge-file"
    ):
        from_megatron(tmp_path / "theirs", tmp_path / "run")
    assert from_megatron(tmp_path / "theirs", tmp_path / "run", "--tokenizer-type", "ByteLevelTokenizer") == 0
    with pytest.raises(ValueError, match="holds checkpoints already"):
        from_megatron(tmp_path / "theirs", tmp_path / "run")


def test_words_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="without --from it takes three words"):
        main(["--to", "megatron", "x"])
    with pytest.raises(ValueError, match="with --from it takes one word"):
        main(["--from", "megatron", "x", "--to", "megatron", "y"])
    with pytest.raises(ValueError, match="other: is not a kind of checkpoint"):
        main(["--from", "other", "x", "--to", "y"])
    with pytest.raises(ValueError, match="is not a run directory"):
        main(["--to", "megatron", "nowhere", "y"])

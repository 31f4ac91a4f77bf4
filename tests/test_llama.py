"""A GPT with the options that make it a Llama or a Qwen: what is refused, counted and kept of them."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalith.bench import made_for_measuring
from megalith.check import check
from megalith.convert_to_megatron import gpt_of
from megalith.models.decoder import Decoder
from megalith.optim.groups import decays
from megalith.plan.job import parameters_on_rank
from megalith.planned import padded_vocabulary, planned
from megalith.run_state import differing
from megalith.sources import read_command_line
from megalith.tasks.gpt import identity, step_flops
from tests.operations import make_countable

SIZES = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 20 --mock-data
    --vocab-size 60 --micro-batch-size 2 --hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by 8
""".split()
OPTIONS = {
    "norms": "--normalization RMSNorm",
    "gate": "--swiglu --ffn-hidden-size 40",
    "biases": "--disable-bias-linear",
    "gelu gate": "--activation-function gated-gelu",
    "rope": "--position-embedding-type rope --rotary-percent 0.5",
    "long": "--position-embedding-type rope --use-rope-scaling --rope-scaling-factor 32",
    "groups": "--group-query-attention --num-query-groups 2",
    "biases of queries": "--disable-bias-linear --add-qkv-bias --group-query-attention --num-query-groups 2",
    "norms of heads": "--qk-layernorm",
    "as a qwen": "--qk-layernorm --normalization RMSNorm --disable-bias-linear --swiglu --kv-channels 12 "
    "--position-embedding-type rope --group-query-attention --num-query-groups 2",
    "all": "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--position-embedding-type rope --rotary-base 500000 --group-query-attention",
}


def faults_of(*words: str, world_size: int = 1) -> list[str]:
    return [str(fault) for fault in check(made_for_measuring(read_command_line([*SIZES, *words]), steps=1), world_size)]


def model_of(words: str, **options: object) -> Decoder:
    run = read_command_line([*SIZES, *words.split()])
    return Decoder(run.model, padded_vocabulary(run), **options)  # type: ignore[arg-type]


def test_options_of_a_llama_are_options_of_a_gpt_and_no_bert() -> None:
    for words in OPTIONS.values():
        assert faults_of(*words.split()) == []
    faults = [str(fault) for fault in check(read_command_line(["bert", *OPTIONS["all"].split()]), 1)]
    assert "--normalization = RMSNorm: is an option of gpt, t5; bert has none such. Leave it out." in faults
    assert "--swiglu: is an option of gpt, t5; bert has none such. Leave it out." in faults
    assert "--disable-bias-linear: is an option of gpt, t5; bert has none such. Leave it out." in faults


def test_what_contradicts_is_told_at_once() -> None:
    assert faults_of("--swiglu", "--activation-function", "relu", "--tensor-model-parallel-size", "5") == [
        "--tensor-model-parallel-size = 5: times --pipeline-model-parallel-size = 1 does not divide the 1 ranks. "
        "Products that fit: [1]; or start another number of ranks (torchrun --nproc-per-node).",
        "--num-attention-heads = 4: is not divisible by --tensor-model-parallel-size = 5. "
        "Tensor-parallel sizes that fit this model: [1, 2, 4].",
        "--ffn-hidden-size = 64: is not divisible by --tensor-model-parallel-size = 5. "
        "Tensor-parallel sizes that fit this model: [1, 2, 4].",
        "--activation-function = relu: contradicts --swiglu. Give only one of them.",
    ]


def test_a_bias_that_is_there_already_is_not_added() -> None:
    assert faults_of("--add-qkv-bias") == [
        "--add-qkv-bias: adds what is there without --disable-bias-linear. Add that, or leave this out."
    ]
    for task in ("bert", "t5", "vit"):
        faults = [str(fault) for fault in check(read_command_line([task, "--add-qkv-bias", "--qk-layernorm"]), 1)]
        for flag in ("--add-qkv-bias", "--qk-layernorm"):
            assert f"{flag}: is an option of gpt; {task} has none such. Leave it out." in faults


def test_positions_that_fit_no_head_or_task_are_refused() -> None:
    assert faults_of("--rotary-base", "100") == [
        "--rotary-base = 100.0: is of --position-embedding-type rope, not of learned_absolute. "
        "Add that, or leave this out."
    ]
    rope = ["--position-embedding-type", "rope"]
    assert faults_of(*rope, "--rotary-percent", "0.4", "--rotary-base", "0") == [
        "--rotary-base = 0.0: must be above 1. Give such a number; 10000 is usual.",
        "--rotary-percent = 0.4: gives 3 of a head's 8 features, and they turn in pairs. "
        "Change it, or --kv-channels, to an even number.",
    ]
    assert faults_of("--use-rope-scaling") == [
        "--use-rope-scaling: is of --position-embedding-type rope, not of learned_absolute. "
        "Add that, or leave this out."
    ]
    assert faults_of(*rope, "--rope-scaling-factor", "0.5") == [
        "--rope-scaling-factor = 0.5: needs --use-rope-scaling. Add that.",
        "--rope-scaling-factor = 0.5: must be at least 1. 8 is usual, or 32.",
    ]
    assert faults_of(*rope, "--rotary-percent", "1.5") == [
        "--rotary-percent = 1.5: must be above 0 and at most 1. 1 is usual."
    ]
    assert faults_of("--position-embedding-type", "relative") == [
        "--position-embedding-type = relative: is an option of t5. Use learned_absolute or rope."
    ]
    faults = [str(fault) for fault in check(read_command_line(["t5", *rope]), 1)]
    assert "--position-embedding-type = rope: is an option of gpt. Use learned_absolute or relative." in faults
    # Megatron-LM's older flag.
    assert read_command_line(["--use-rotary-position-embeddings"]).model.position_embedding_type == "rope"


def test_groups_that_heads_or_ranks_cannot_share_are_refused() -> None:
    assert faults_of("--num-query-groups", "2") == ["--num-query-groups = 2: needs --group-query-attention. Add that."]
    grouped = ["--group-query-attention", "--num-query-groups"]
    assert faults_of(*grouped, "3") == [
        "--num-query-groups = 3: does not divide --num-attention-heads = 4. Groups that do: [1, 2, 4]."
    ]
    tensor = ["--tensor-model-parallel-size", "4"]
    assert faults_of(*grouped, "2", *tensor, world_size=4) == [
        "--num-query-groups = 2: is not divisible by --tensor-model-parallel-size = 4, whose ranks hold whole groups. "
        "Tensor-parallel sizes that fit this model: [1, 2]."
    ]
    context = ["--context-parallel-size", "2", "--context-exchange", "all-to-all"]
    assert faults_of(*grouped, "1", *context, world_size=2) == [
        "--context-parallel-size = 2: does not divide the 1 groups of heads of a tensor rank, which "
        "--context-exchange all-to-all trades. Sizes that fit: [1]; or use --context-exchange gather."
    ]
    assert faults_of(*grouped, "1", "--context-parallel-size", "2", world_size=2) == []


@pytest.mark.parametrize("option", OPTIONS)
def test_its_parameters_are_those_that_are_planned(option: str) -> None:
    run = made_for_measuring(read_command_line([*SIZES, *OPTIONS[option].split()]), steps=1)
    job = planned(run, 1, vocab_size=padded_vocabulary(run), device="cpu")
    model = model_of(OPTIONS[option], device="meta")
    assert parameters_on_rank(job) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("option", OPTIONS)
def test_its_operations_are_those_that_pytorch_counts(option: str) -> None:
    run = read_command_line([*SIZES, *OPTIONS[option].split()])
    model = model_of(OPTIONS[option])
    make_countable(model)
    tokens = torch.ones(5, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, torch.arange(16).expand(5, 16)).sum().backward()
    assert counter.get_total_flops() == pytest.approx(step_flops(run, padded_vocabulary(run), 5), rel=1e-3)


def test_the_preset_of_a_large_one_has_its_parameters() -> None:
    run = made_for_measuring(read_command_line("--preset llama3-8b --vocab-size 128256".split()), steps=1)
    assert check(run, 1) == []
    job = planned(run, 1, vocab_size=padded_vocabulary(run), device="cuda")
    assert parameters_on_rank(job) == 8_030_261_248  # as Hugging Face's index of its files has it, 16,060,522,496 bytes


# Parameters as Hugging Face's indexes of their files have them, of 2 bytes each.
QWENS = {
    "Qwen2.5-7B": (
        7_615_616_512,
        152064,
        "--num-layers 28 --hidden-size 3584 --num-attention-heads 28 --ffn-hidden-size 18944 --num-query-groups 4 "
        "--add-qkv-bias",
    ),
    "Qwen3-8B": (
        8_190_735_360,
        151936,
        "--num-layers 36 --hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 12288 --num-query-groups 8 "
        "--kv-channels 128 --qk-layernorm",
    ),
}


@pytest.mark.parametrize("name", QWENS)
def test_qwens_have_their_parameters(name: str) -> None:
    count, vocab_size, words = QWENS[name]
    of_llamas = "--untie-embeddings-and-output-weights --position-embedding-type rope --group-query-attention"
    words = f"{words} --normalization RMSNorm --swiglu --disable-bias-linear {of_llamas} --vocab-size {vocab_size}"
    sizes = "--seq-length 4096 --max-position-embeddings 32768 --micro-batch-size 1".split()
    run = made_for_measuring(read_command_line([*words.split(), *sizes]), steps=1)
    assert check(run, 1) == []
    assert parameters_on_rank(planned(run, 1, vocab_size=padded_vocabulary(run), device="cuda")) == count


def test_norms_and_biases_of_queries_and_keys_do_not_decay() -> None:
    model = model_of("--qk-layernorm --disable-bias-linear --add-qkv-bias", device="meta")
    constant = {name for name, parameter in model.named_parameters() if not decays(name, parameter)}
    for what in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias", "qkv.bias"):
        assert f"layers.1.attention.{what}" in constant
    assert "layers.1.attention.qkv.weight" not in constant


def test_a_checkpoint_of_another_kind_of_model_is_told_by_its_options() -> None:
    kept = {name: identity(read_command_line([*SIZES, *words.split()])) for name, words in OPTIONS.items()}
    plain = identity(read_command_line(SIZES))
    # So that a plain GPT's checkpoints are what they were.
    assert plain == {}
    assert json.loads(json.dumps(kept)) == kept
    assert [*differing(kept["gate"], kept["gelu gate"])] == [
        ("activation_function", "gelu", "gated-gelu"),
        ("swiglu", True, False),
    ]
    assert [*differing(plain, kept["norms"])] == [("normalization", "LayerNorm", "RMSNorm")]
    assert [*differing(kept["biases"], plain)] == [("add_bias_linear", False, True)]
    assert [*differing(plain, kept["norms of heads"])] == [("qk_layernorm", False, True)]
    assert ("add_qkv_bias", True, False) in differing(kept["biases of queries"], kept["biases"])
    assert [*differing(kept["rope"], kept["all"])][-3:] == [
        ("rotary_base", 10000.0, 500000.0),
        ("group_query_attention", False, True),
        ("rotary_percent", 0.5, 1.0),
    ]
    # Without a table of positions there may be more of them.
    assert kept["rope"]["max_position_embeddings"] is None
    assert [*differing({"hidden_size": 32, **kept["all"]}, {"hidden_size": 32, **kept["all"]})] == []


def test_megatrons_files_hold_none_of_it(tmp_path: Path) -> None:
    settings = "swiglu = true\nadd_bias_linear = false\nadd_qkv_bias = true\nqk_layernorm = true\n"
    (tmp_path / "run.toml").write_text(f'task = "gpt"\n[model]\n{settings}')
    said = "has --disable-bias-linear, --add-qkv-bias, --qk-layernorm, --swiglu, which Megatron-LM"
    with pytest.raises(ValueError, match=said):
        gpt_of(str(tmp_path))

"""GPTs, Llamas and Qwens of Hugging Face become run directories and back: the same logits, the same tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalith.cli import main
from megalith.convert_to_hugging_face import to_hugging_face
from megalith.data.tokenizer import load_saved_tokenizer, train_byte_bpe
from megalith.evaluate.generate import Sampling, generate
from megalith.trained import open_trained
from tests.conversions import from_hugging_face
from tests.layouts.runs import MODEL, steps_of, weights_of

transformers = pytest.importorskip("transformers")

TEXTS = [f"the word number {number} and another one" for number in range(40)]
V, T = 280, 15
ROUNDING = 4e-6  # of the largest logit, as in tests/twins/test_llama.py
GPT2 = {"n_layer": 3, "n_embd": 24, "n_head": 4, "n_positions": 16}
LLAMA = {
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "pad_token_id": None,
}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2, erf and an output of its own": {
        "model_type": "gpt2",
        **GPT2,
        "activation_function": "gelu",
        "n_inner": 20,
        "tie_word_embeddings": False,
    },
    "llama": {"model_type": "llama", **LLAMA, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "llama, biases and a tied table": {
        "model_type": "llama",
        **LLAMA,
        "head_dim": 10,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    },
    "llama, angles for long texts": {
        "model_type": "llama",
        **LLAMA,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e9,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen2": {"model_type": "qwen2", **LLAMA, "num_key_value_heads": 2},
    "qwen2, a tied table": {
        "model_type": "qwen2",
        **LLAMA,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen3": {"model_type": "qwen3", **LLAMA, "num_key_value_heads": 2, "head_dim": 10},
    "qwen3, a tied table": {
        "model_type": "qwen3",
        **LLAMA,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "rms_norm_eps": 0.1,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}
OF_LLAMAS = """
    --normalization RMSNorm --disable-bias-linear --swiglu --untie-embeddings-and-output-weights
    --position-embedding-type rope --group-query-attention --num-query-groups 2
""".split()
TRAINED = {
    "gpt2": [],
    "llama": OF_LLAMAS,
    "qwen2": [*OF_LLAMAS, "--add-qkv-bias"],
    "qwen3": [*OF_LLAMAS, "--qk-layernorm", "--kv-channels", "12"],
}


def write_model(folder: Path, kind: str, **changes: Any) -> Any:
    """A directory as Hugging Face's hub has it, with GPT-2's kind of tokenizer; the model in it."""
    folder.mkdir()
    tokenizer = train_byte_bpe(TEXTS, V, folder)
    options = {**KINDS[kind], "vocab_size": tokenizer.vocab_size, "initializer_range": 0.2}
    config = transformers.AutoConfig.for_model(**options, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(1)
    twin = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in twin.parameters():  # biases and norms do not start where they would hide a mistake
            parameter += 0.1 * torch.randn_like(parameter)
    weights = {name: weight.contiguous() for name, weight in twin.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict() | changes))
    return twin


def logits_of(run_dir: Path, tokens: torch.Tensor) -> torch.Tensor:
    """By our model of a run directory."""
    trained = open_trained(str(run_dir), step=None, device="cpu")
    assert trained.tokenizer.vocab_size > int(tokens.max())
    with torch.no_grad():
        logits: torch.Tensor = trained.model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))
    return logits[..., : trained.tokenizer.vocab_size]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, as a share of the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_comes_and_goes_gives_the_same_logits_and_weights(kind: str, tmp_path: Path) -> None:
    theirs, run_dir, again = (tmp_path / name for name in ("theirs", "run", "again"))
    twin = write_model(theirs, kind)
    assert main(["convert", "--from", "huggingface", str(theirs), "--to", str(run_dir)]) == 0
    tokens = torch.randint(270, (2, T), generator=torch.Generator().manual_seed(3))
    expected = twin(input_ids=tokens).logits.detach()
    assert difference(logits_of(run_dir, tokens), expected) < ROUNDING
    assert main(["convert", "--to", "huggingface", str(run_dir), str(again)]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    returned = transformers.AutoModelForCausalLM.from_pretrained(again).eval()
    assert torch.equal(returned(input_ids=tokens).logits, expected)
    assert returned.config.initializer_range == twin.config.initializer_range
    for name in ("vocab.json", "merges.txt"):
        assert (again / name).read_bytes() == (theirs / name).read_bytes()


@pytest.mark.parametrize("kind", TRAINED)
def test_a_trained_model_gives_the_same_logits_there(kind: str, data: Path, tmp_path: Path) -> None:
    words = [*MODEL, *TRAINED[kind], "--data-path", str(data), "--save", str(tmp_path / "run"), "--train-iters", "3"]
    assert main(["pretrain", *words, "--eval-iters", "0"]) == 0
    assert len(steps_of(tmp_path / "run")) == 3
    assert main(["convert", "--to", "huggingface", str(tmp_path / "run"), str(tmp_path / "theirs")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert model.config.model_type == kind
    # The table is padded to 264 rows here, and not there.
    assert model.config.vocab_size == 257
    assert model.generation_config.eos_token_id == 256
    tokens = torch.randint(257, (2, T), generator=torch.Generator().manual_seed(3))
    assert difference(model(input_ids=tokens).logits, logits_of(tmp_path / "run", tokens)) < ROUNDING


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3"])
def test_it_continues_texts_as_there(kind: str, tmp_path: Path) -> None:
    twin = write_model(tmp_path / "theirs", kind)
    assert from_hugging_face(tmp_path) == 0
    trained = open_trained(str(tmp_path / "run"), step=None, device="cpu")
    twin.generation_config.eos_token_id = None
    for prompt in ([5, 6, 7], [8, 9, 10, 11, 12, 13]):
        (expected,) = twin.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
        (found,) = generate(
            trained.model,
            [prompt],
            max_new_tokens=8,
            sampling=Sampling(temperature=0),
            vocab_size=trained.tokenizer.vocab_size,
        )
        assert [*prompt, *found] == expected
        assert len(set(found)) > 2


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_training_goes_on_from_it(kind: str, data: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "theirs", kind)
    run_dir, save = tmp_path / "run", tmp_path / "tuned"
    assert main(["convert", "--from", "huggingface", str(tmp_path / "theirs"), "--to", str(run_dir)]) == 0
    words = f"""
        {run_dir}/run.toml --finetune --load {run_dir} --save {save} --save-interval 2 --train-iters 2 --lr 0
        --micro-batch-size 2 --eval-iters 0 --data-path {data} --log-format json --device cpu --log-interval 1
    """.split()
    assert main(["pretrain", *words]) == 0
    assert len(steps_of(save)) == 2
    before, after = weights_of(run_dir), weights_of(save)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    # What it learns next it takes along.
    assert main(["convert", "--to", "huggingface", str(save), str(tmp_path / "again")]) == 0


def test_its_tokenizer_gives_the_same_tokens_there(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs", "llama")
    assert from_hugging_face(tmp_path) == 0
    assert main(["convert", "--to", "huggingface", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    ours = load_saved_tokenizer(tmp_path / "run" / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    text = "the word number 7 and  another one's\n"
    assert tokenizer(text)["input_ids"] == ours.encode(text)
    assert tokenizer.eos_token_id == ours.eod
    assert tokenizer.decode(ours.encode(text)) == text


def test_a_large_model_is_several_files_and_an_index(tmp_path: Path) -> None:
    twin = write_model(tmp_path / "theirs", "llama")
    assert from_hugging_face(tmp_path) == 0
    told = list(to_hugging_face(str(tmp_path / "run"), str(tmp_path / "again"), step=None, largest_file=30_000))
    files = sorted(path.name for path in (tmp_path / "again").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    assert sum(".safetensors" in line for line in told) == len(files)
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in twin.state_dict().values())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in twin.state_dict().items())
    # And it comes back.
    assert main(["convert", "--from", "huggingface", str(tmp_path / "again"), "--to", str(tmp_path / "back")]) == 0
    first, second = weights_of(tmp_path / "run"), weights_of(tmp_path / "back")
    assert all(torch.equal(second[name], weight) for name, weight in first.items())


def test_a_gpt2_without_its_head_can_be_read(tmp_path: Path) -> None:
    twin = write_model(tmp_path / "theirs", "gpt2")
    file = tmp_path / "theirs" / "model.safetensors"
    save_file({name.removeprefix("transformer."): weight for name, weight in load_file(file).items()}, file)
    assert from_hugging_face(tmp_path) == 0
    tokens = torch.arange(T)[None]
    assert difference(logits_of(tmp_path / "run", tokens), twin(input_ids=tokens).logits.detach()) < ROUNDING


def test_a_directory_of_links_as_the_hubs_cache_has_it_can_be_read(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs", "gpt2")
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted((tmp_path / "theirs").iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(f"../blobs/{number}")
    assert from_hugging_face(tmp_path) == 0


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; False can be"),
        ("gpt2", {"activation_function": "silu"}, "activation_function is 'silu'; gelu_new and gelu_pytorch_tanh and"),
        ("gpt2", {"n_layer": 4}, "its weights lack transformer.h.3.ln_1.weight"),
        ("gpt2", {"embd_pdrop": 0.3}, "embd_pdrop is 0.3 and resid_pdrop 0.1, which are one here, --hidden-dropout"),
        (
            "gpt2",
            {"layer_norm_epsilon": "1"},
            "config.json: layer_norm_epsilon is '1'; it must be a number of 0 or more",
        ),
        ("gpt2", {"is_causal": False}, "config.json: is_causal is False; True can be converted"),
        (
            "gpt2",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config is {'quant_method': 'fp8'}; None",
        ),
        ("llama", {"is_causal": False}, "config.json: is_causal is False; True can be converted"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_type is 'linear'; default and llama3 can be",
        ),
        ("llama", {"rope_scaling": [2.0]}, "rope_scaling or rope_parameters is [2.0]; it must be an object"),
        (
            "llama, biases and a tied table",
            {"rms_norm_eps": -1},
            "rms_norm_eps is -1; it must be a number of 0 or more",
        ),
        ("llama", {"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu'; silu can be converted"),
        ("llama", {"mlp_bias": True}, "config.json: mlp_bias is True; False can be converted"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": None}, "factor is 0, of a rope_type"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 2.0}},
            "high_freq_factor is 2.0; 4.0 can be converted",
        ),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_attention_heads = 4"),
        ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1}, "layers.0.attention.qkv.weight are (48, 24)"),
        ("qwen2", {"use_sliding_window": True}, "config.json: use_sliding_window is True; False can be converted"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "config.json: layer_types is ['full_attention', 'sliding_attention', 'full_attention']; full_attention in",
        ),
        ("qwen3", {"layer_types": 3}, "config.json: layer_types is 3; full_attention in every layer can be converted"),
        ("qwen3", {"attention_bias": True}, "config.json: attention_bias is True; False can be converted"),
        (
            "qwen2",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "type is 'yarn'; default and llama3 can be converted",
        ),
        ("qwen3", {"head_dim": 12}, "the weights for layers.0.attention.qkv.weight are (80, 24), config.json wants"),
        ("llama", {"intermediate_size": 27}, "the weights for layers.0.feedforward.up.weight are (28, 24)"),
    ],
)
def test_what_cannot_come_is_said(
    kind: str, changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "theirs", kind, **changes)
    assert from_hugging_face(tmp_path) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_not_the_table_it_is_tied_to_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "theirs", "gpt2")
    file = tmp_path / "theirs" / "model.safetensors"
    weights = load_file(file)
    table = weights["transformer.wte.weight"]
    save_file({**weights, "lm_head.weight": table + 1}, file)
    assert from_hugging_face(tmp_path) == 2
    assert "lm_head.weight differs from the table of tokens, which config.json ties" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    save_file({**weights, "lm_head.weight": table.clone()}, file)
    assert from_hugging_face(tmp_path) == 0


def test_tensors_that_such_a_model_has_not_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "theirs", "gpt2")
    file = tmp_path / "theirs" / "model.safetensors"
    weights = load_file(file) | {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    save_file(weights, file)
    words = ["convert", "--from", "huggingface", str(tmp_path / "theirs"), "--to"]
    assert main([*words, str(tmp_path / "run")]) == 0
    assert "warning" not in capsys.readouterr().out
    save_file(weights | {"transformer.h.0.attn.q_norm.weight": torch.ones(6), "score.weight": torch.ones(2, 24)}, file)
    assert main([*words, str(tmp_path / "second")]) == 0
    assert "warning: left out score.weight and 1 more, for which a gpt2 has no place" in capsys.readouterr().out


def test_a_converted_model_is_evaluated_on_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = write_model(tmp_path / "theirs", "gpt2")
    assert from_hugging_face(tmp_path) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "--split = valid: the run has no data of its own. Name files: --file FILE." in capsys.readouterr().err
    (tmp_path / "some.txt").write_text("the word number 7")
    assert main(["evaluate", str(tmp_path / "run"), "--file", str(tmp_path / "some.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tokenizer = load_saved_tokenizer(tmp_path / "run" / "tokenizer")
    tokens = torch.tensor([[*tokenizer.encode("the word number 7"), tokenizer.eod]])
    assert found["tokens"] == tokens.shape[1] - 1 <= T
    assert found["loss"] == pytest.approx(twin(input_ids=tokens, labels=tokens).loss.item(), rel=1e-5)


def test_added_tokens_beyond_a_vocabulary_are_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "theirs", "gpt2")
    (tmp_path / "theirs" / "added_tokens.json").write_text(json.dumps({"[PAD]": V}))
    assert from_hugging_face(tmp_path) == 2
    assert "added_tokens.json: a GPT2BPETokenizer has no place for '[PAD]'." in capsys.readouterr().err
    (tmp_path / "theirs" / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": V - 1}))
    assert from_hugging_face(tmp_path) == 0


def test_a_dropout_of_null_is_none(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs", "llama", attention_dropout=None)
    assert from_hugging_face(tmp_path) == 0
    assert "attention_dropout = 0.0" in (tmp_path / "run" / "run.toml").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layer": 10**6}, "tensors are none of 1000000 layers, as config.json wants"),
        (
            {"n_inner": 10**20},
            "config.json: n_inner is 100000000000000000000; it must be a number of 1 or more, at most",
        ),
        ({"n_inner": int("9" * 70)}, "config.json: n_inner is 9999"),
    ],
    ids=["layers", "features", "digits"],
)
def test_sizes_that_nothing_bears_out_are_refused_at_once(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "theirs", "gpt2", **changes)
    assert from_hugging_face(tmp_path) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("transformer.wte.weight", (), "transformer.wte.weight has the shape (), which no weight has"),
        ("transformer.h.0.attn.c_attn.weight", (0, 0), "has the shape (0, 0), which no weight has"),
        ("transformer.h.0.attn.c_attn.bias", (), "has the shape (), which no weight has"),
    ],
)
def test_weights_of_no_possible_shape_are_refused(
    name: str, shape: tuple[int, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "theirs", "gpt2")
    file = tmp_path / "theirs" / "model.safetensors"
    save_file({**load_file(file), name: torch.zeros(shape)}, file)
    assert from_hugging_face(tmp_path) == 2
    assert said in capsys.readouterr().err


def test_queries_and_keys_of_other_widths_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "theirs", "llama")
    file = tmp_path / "theirs" / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.self_attn.k_proj.weight": torch.zeros(12, 3)}, file)
    assert from_hugging_face(tmp_path) == 2
    assert "v_proj.weight have rows of different lengths" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([], "weight_map is []; it must be an object"),
        ({"a": ["b"]}, "names a file ['b'], which is none of the directory's"),
        ({"a": 1, "b": "c"}, "names a file 1, which is none of the directory's"),
        ({"a": "../run/b"}, "names a file '../run/b', which is none of the directory's"),
        ({"a": "b\0"}, "names a file 'b\\x00', which is none of the directory's"),
    ],
)
def test_an_index_of_anything_but_files_of_the_directory_is_refused(
    listed: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "theirs", "gpt2")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    (tmp_path / "theirs" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    assert from_hugging_face(tmp_path) == 2
    assert said in capsys.readouterr().err


def test_a_config_with_a_number_of_thousands_of_digits_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "theirs", "gpt2")
    (tmp_path / "theirs" / "config.json").write_text('{"n_layer": ' + "1" * 6000 + "}")
    assert from_hugging_face(tmp_path) == 2
    assert "config.json: is no JSON (Exceeds the limit" in capsys.readouterr().err


def test_what_cannot_go_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", "--to", "huggingface", str(tmp_path), str(tmp_path / "theirs")]
    sizes = "num_layers = 2\nhidden_size = 32\nnum_attention_heads = 4\nmax_position_embeddings = 16\n"
    (tmp_path / "run.toml").write_text(f'task = "gpt"\n[model]\n{sizes}swiglu = true\n')
    assert main(words) == 2
    assert (
        "Hugging Face has no such model: a gpt2 is none with --swiglu; a llama is none with --normalization = "
        "LayerNorm, --position-embedding-type = learned_absolute; a qwen2 is none with" in capsys.readouterr().err
    )
    of_llamas = 'normalization = "RMSNorm"\nswiglu = true\nposition_embedding_type = "rope"\n'
    of_qwens = "add_bias_linear = false\nadd_qkv_bias = true\nqk_layernorm = true\n"
    (tmp_path / "run.toml").write_text(f'task = "gpt"\n[model]\n{sizes}{of_llamas}{of_qwens}')
    assert main(words) == 2
    assert (
        "; a llama is none with --add-qkv-bias, --qk-layernorm; a qwen2 is none with --qk-layernorm; a qwen3 is none "
        "with --add-qkv-bias." in capsys.readouterr().err
    )
    (tmp_path / "run.toml").write_text(f'task = "gpt"\n[model]\n{sizes}{of_llamas}qk_layernorm = true\n')
    assert main(words) == 2
    assert (
        "; a llama is none with --qk-layernorm; a qwen2 is none without --disable-bias-linear, --add-qkv-bias and with "
        "--qk-layernorm; a qwen3 is none without --disable-bias-linear." in capsys.readouterr().err
    )
    (tmp_path / "run.toml").write_text(f'task = "bert"\n[model]\n{sizes}')
    assert main(words) == 2
    assert "holds a bert model; only a gpt can be converted." in capsys.readouterr().err
    (tmp_path / "run.toml").write_text(f'task = "gpt"\n[model]\n{sizes}')
    assert main(words) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "theirs").exists()

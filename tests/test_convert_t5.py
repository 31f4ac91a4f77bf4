"""T5s of Hugging Face become run directories: the same logits, their own tokenizer, and training goes on from them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megalith.checkpoint.index import Index
from megalith.cli import main
from megalith.data.indexed import IndexedWriter
from megalith.data.masking import WORDPIECE
from megalith.data.spans import pieces_for_spans
from megalith.data.tokenizer import load_saved_tokenizer
from megalith.models.t5 import T5
from megalith.trained import load_weights, run_of
from tests.conversions import from_hugging_face
from tests.layouts.runs import steps_of, weights_of
from tests.twins.test_t5 import PAD, B, T, difference, twin_of

pytest.importorskip("transformers")

WORDS = [f"word{number}" for number in range(30)]
VERSIONS: dict[str, dict[str, Any]] = {
    "1.0": {},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
ROUNDING = 4e-6  # of the largest logit, as in tests/twins/test_t5.py


def write_tokenizer(folder: Path) -> None:
    """Words with a mark where they begin, as SentencePiece writes them, and four sentinels, the last one first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "</s>", "<unk>"]
    pieces = ["▁a", "ing", *(f"▁{word}" for word in WORDS)]
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(4))]
    scores = [(token, -1.0 - number / 100) for number, token in enumerate([*special, *pieces, *sentinels])]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*special, *sentinels])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": "</s>"}))


def write_model(folder: Path, version: str, **changes: Any) -> Any:
    """A directory as Hugging Face's hub has it; the model in it."""
    folder.mkdir()
    twin = twin_of(VERSIONS[version])
    shared = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} | (
        {"lm_head.weight"} if version == "1.0" else set()
    )
    weights = {name: weight.contiguous() for name, weight in twin.state_dict().items() if name not in shared}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(twin.config.to_json_string(use_diff=False))
    if version == "1.0":
        # As files of older versions of the library have it.
        del config["scale_decoder_outputs"]
    (folder / "config.json").write_text(json.dumps(config | changes))
    write_tokenizer(folder)
    return twin


def loaded(run_dir: Path) -> T5:
    run = run_of(str(run_dir))

    def build(index: Index) -> T5:
        return T5(run.model, index.state["model"]["padded_vocab_size"], device="meta").to_empty(device="cpu")

    return load_weights(str(run_dir), build, step=None)[0].eval()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_converted_model_gives_the_same_logits(version: str, tmp_path: Path) -> None:
    twin = write_model(tmp_path / "theirs", version).eval()
    assert from_hugging_face(tmp_path) == 0
    model = loaded(tmp_path / "run")
    assert model.tied == (version == "1.0") and model.config.scale_decoder_outputs == (version == "1.0")
    generator = torch.Generator().manual_seed(3)
    tokens, decoder = (
        torch.randint(1, 39, (B, 11), generator=generator),
        torch.randint(1, 39, (B, T), generator=generator),
    )
    tokens[0, 7:] = PAD
    expected = twin(input_ids=tokens, attention_mask=(tokens != PAD).long(), decoder_input_ids=decoder).logits
    logits = model(torch.cat([tokens, decoder], 1), padding=(tokens == PAD).int())
    assert difference(logits, expected) < ROUNDING


@pytest.mark.parametrize("changed", [0.0, 1e-3])
def test_an_output_that_is_stored_and_is_the_table_is_tied_to_it(changed: float, tmp_path: Path) -> None:
    write_model(tmp_path / "theirs", "1.0")
    file = tmp_path / "theirs" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": weights["shared.weight"] + changed}, file, metadata={"format": "pt"})
    assert from_hugging_face(tmp_path) == 0
    assert loaded(tmp_path / "run").tied == (changed == 0)


def test_its_tokenizer_tells_words_and_sentinels(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs", "1.0")
    assert from_hugging_face(tmp_path) == 0
    tokenizer = load_saved_tokenizer(tmp_path / "run" / "tokenizer")
    assert tokenizer.name not in WORDPIECE and tokenizer.extra_ids == (38, 37, 36, 35)
    pieces = pieces_for_spans(tokenizer)
    ids = tokenizer.encode("word3 wording")
    assert [bool(pieces.begins_word[number]) for number in tokenizer.encode("word3 aing word5")] == [
        True,
        True,
        False,
        True,
    ]
    assert (
        ids and pieces.fixed[[0, 1, *tokenizer.extra_ids]].all() and not pieces.fixed[tokenizer.encode("word3")].any()
    )


def test_a_decoder_that_begins_with_another_token_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "theirs", "1.0")
    config = tmp_path / "theirs" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "decoder_start_token_id": 2}))
    assert from_hugging_face(tmp_path) == 2
    assert "decoder_start_token_id is 2 in config.json, and a t5 begins with 0" in capsys.readouterr().err
    config.write_text(json.dumps({**settings, "decoder_start_token_id": 0}))
    assert from_hugging_face(tmp_path) == 0


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "theirs", "1.0")
    (tmp_path / "theirs" / "tokenizer_config.json").unlink()
    assert from_hugging_face(tmp_path) == 2
    assert "theirs: a t5 needs pad_token, which tokenizer_config.json names. Put it there" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_goes_on_from_it(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs", "1.1")
    run_dir, save = tmp_path / "run", tmp_path / "tuned"
    assert main(["convert", "--from", "huggingface", str(tmp_path / "theirs"), "--to", str(run_dir)]) == 0
    random = np.random.RandomState(4)
    with IndexedWriter(tmp_path / "text_sentence", np.uint16) as writer:
        for _ in range(20):
            writer.add_document([random.randint(5, 35, random.randint(4, 12)) for _ in range(3)])
    words = f"""
        {run_dir}/run.toml --finetune --load {run_dir} --save {save} --save-interval 2 --train-iters 2 --lr 0
        --encoder-seq-length 20 --decoder-seq-length 12 --micro-batch-size 2 --split 100,0,0 --eval-iters 0
        --data-path {tmp_path}/text_sentence --log-format json --device cpu --log-interval 1
    """.split()
    assert main(["pretrain", *words]) == 0
    assert len(steps_of(save)) == 2
    before, after = weights_of(run_dir), weights_of(save)
    assert before.keys() == {name for name in after if name.startswith("weight.")}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "bart"},
            "config.json: model_type is 'bart'; of gpt2, llama, qwen2, qwen3, t5 one can be converted",
        ),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'; relu and gated-gelu are known"),
        ({"num_decoder_layers": 5}, "num_decoder_layers differs from num_layers = 3; stacks must be equal here"),
        ({"num_layers": 4, "num_decoder_layers": 4}, "its weights lack encoder.block.3"),
        ({"d_ff": 41}, "the weights for encoder.0.feedforward.up.weight are (40, 24), config.json wants (41, 24)"),
        ({"dense_act_fn": "gelu_new"}, "config.json: dense_act_fn is 'gelu_new'; relu can be converted"),
        ({"is_gated_act": True}, "config.json: is_gated_act is True; False can be converted"),
        ({"relative_attention_max_distance": "far"}, "relative_attention_max_distance is 'far'; it must be a number"),
        ({"d_kv": "many"}, "config.json: d_kv is 'many'; it must be a number of 1 or more"),
    ],
)
def test_what_cannot_be_converted_is_said(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "theirs", "1.0", **changes)
    assert from_hugging_face(tmp_path) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_and_damaged_files_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "theirs", "1.0")
    weights = tmp_path / "theirs" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-10])
    assert from_hugging_face(tmp_path) == 2
    assert "model.safetensors" in capsys.readouterr().err
    weights.write_bytes(kept)
    (tmp_path / "theirs" / "config.json").write_text("[1")
    assert from_hugging_face(tmp_path) == 2
    assert "config.json: is no JSON" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "theirs")
    assert from_hugging_face(tmp_path) == 2
    assert "config.json" in capsys.readouterr().err

"""`python -m megalith.pretrain_gpt` takes Megatron-LM's flags and trains, as a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.layouts.runs import write_data

FLAGS = """
    --num-layers 2 --hidden-size 16 --num-attention-heads 2 --micro-batch-size 2 --global-batch-size 4 --seq-length 16
    --max-position-embeddings 16 --train-iters 2 --lr-decay-iters 2 --tokenizer-type ByteLevelTokenizer
    --data-impl mmap --split 800,100,100 --distributed-backend nccl --lr 0.00015 --min-lr 1.0e-5
    --lr-decay-style cosine --weight-decay 1e-2 --clip-grad 1.0 --lr-warmup-fraction .01 --checkpoint-activations
    --log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 1 --fp16 --initial-loss-scale 128
""".split()


def test_the_flags_of_megatrons_program_train_two_steps(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "megalith.pretrain_gpt", *FLAGS, "--data-path", str(write_data(tmp_path))]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"^ iteration +([12])/ +2 \|.* lm loss: (\d\.\d+E\+\d+) \|", done.stdout, re.MULTILINE)
    assert [number for number, _ in steps] == ["1", "2"], done.stdout
    # An untrained model guesses among 384 rows of the table.
    assert all(5.5 < float(loss) < 6.5 for _, loss in steps)


def test_what_is_wrong_with_the_flags_is_said_in_a_sentence_each(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "megalith.pretrain_gpt", "--num-layer", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "megalith: --num-layer: is not a known flag. Did you mean --num-layers?\n"

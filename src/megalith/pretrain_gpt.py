"""`python -m megalith.pretrain_gpt FLAGS` is `megalith pretrain gpt FLAGS`, for scripts made for Megatron-LM."""

import sys

from megalith.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", "gpt", *sys.argv[1:]]))

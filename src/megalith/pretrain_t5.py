"""`python -m megalith.pretrain_t5 FLAGS` is `megalith pretrain t5 FLAGS`, for scripts made for Megatron-LM."""

import sys

from megalith.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", "t5", *sys.argv[1:]]))

"""`python -m megalith.pretrain_bert FLAGS` is `megalith pretrain bert FLAGS`, for scripts made for Megatron-LM."""

import sys

from megalith.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", "bert", *sys.argv[1:]]))

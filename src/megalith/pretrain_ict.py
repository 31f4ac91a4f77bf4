"""`python -m megalith.pretrain_ict FLAGS` is `megalith pretrain ict FLAGS`, for scripts made for Megatron-LM."""

import sys

from megalith.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", "ict", *sys.argv[1:]]))

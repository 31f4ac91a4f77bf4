"""`python -m megalith.pretrain_vit FLAGS` is `megalith pretrain vit FLAGS`, for scripts made for Megatron-LM."""

import sys

from megalith.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", "vit", *sys.argv[1:]]))

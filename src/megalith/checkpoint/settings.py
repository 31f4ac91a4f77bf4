"""Settings: what is saved and what a run starts from."""

import os
from dataclasses import dataclass

from megalith.fields import setting

FOLDER = "checkpoints"  # in a run directory
TRACKER = "latest_checkpointed_iteration.txt"  # of a directory of Megatron-LM's checkpoints


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved and what a run starts from."""

    save: str | None = setting(None, "checkpoint output directory", section="checkpointing")
    save_interval: int | None = setting(None, "iterations between checkpoints", section="checkpointing", unit="steps")
    load: str | None = setting(
        None, "run directory whose newest checkpoint to start from, or one checkpoint of it", section="checkpointing"
    )
    finetune: bool = setting(False, "load weights only, iteration 0", section="checkpointing", switch="on")
    no_save_optim: bool | None = setting(
        None, "leave the optimizer out of checkpoints", section="checkpointing", switch="on"
    )
    no_save_rng: bool | None = setting(
        None, "leave RNG states out (accepted; there are none)", section="checkpointing", switch="on"
    )
    no_load_optim: bool | None = setting(None, "skip the optimizer on load", section="checkpointing", switch="on")
    no_load_rng: bool | None = setting(
        None, "skip RNG states on load (accepted; there are none)", section="checkpointing", switch="on"
    )
    adlr_autoresume: bool = setting(
        False, "NVIDIA's own module for resuming (accepted; send SIGUSR1)", section="autoresume", switch="on"
    )
    adlr_autoresume_interval: int = setting(
        1000, "between looks at the resume signal (accepted; every step)", section="autoresume", unit="steps"
    )
    bert_load: str | None = setting(
        None, "BERT checkpoint to start ICT from", section="biencoder", task="ict, retriever"
    )
    ict_load: str | None = setting(
        None, "old ICT checkpoint (accepted; megalith index takes the run directory)", section="biencoder", task="ict"
    )
    auto_resume: bool = setting(
        True,
        "refuse to start where --save holds checkpoints, instead of going on from the newest",
        section="checkpointing",
        flag="--no-auto-resume",
        switch="off",
    )
    exit_on_missing_checkpoint: bool = setting(
        False,
        "refuse to begin anew where --load, or without it --save, holds no checkpoint",
        section="checkpointing",
        switch="on",
    )
    on_save_failure: str = setting(
        "continue",
        "when a checkpoint cannot be written: continue (the next one is tried anew) or stop",
        section="checkpointing",
        choices=("continue", "stop"),
    )
    keep_last: int | None = setting(
        None, "keep only this many of the newest checkpoints", section="checkpointing", unit="checkpoints"
    )
    keep_every: int | None = setting(
        None,
        "with --keep-last: keep also every checkpoint at a multiple of this",
        section="checkpointing",
        unit="steps",
    )
    allow_changed_data: bool = setting(
        False,
        "go on from a checkpoint although data, seed or the way samples are cut differ, or with another tokenizer than "
        "the data's; what differs is logged",
        section="checkpointing",
        switch="on",
    )

    @property
    def loads_own(self) -> bool:
        """Whether --load names the directory of --save, however each is written."""
        both = self.load is not None and self.save is not None
        return both and os.path.realpath(str(self.load)) == os.path.realpath(str(self.save))

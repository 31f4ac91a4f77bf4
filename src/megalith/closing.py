"""What a run leaves a person with: what was learnt, a sample of it, and how to go on."""

import shlex
import sys

import torch

from megalith.derived import compute_dtype, sequence_length
from megalith.evaluate.generate import Sampling
from megalith.evaluate.laid import continue_together
from megalith.evaluate.talk import continuations, eod_of, prompt_ids, shown
from megalith.job import Job
from megalith.models.decoder import Decoder
from megalith.models.shape import shape_of
from megalith.monitor.log import choose_format

SAMPLE_TOKENS = 120


def tell_what_next(job: Job, reason: str | None, *, saved: bool) -> None:
    """Say what was learnt, show a sample, and name the commands that go on from here. Every rank calls it.

    saved: there is a checkpoint.
    """
    if reason is None:
        _tell_losses(job)
        _tell_sample(job)
    save = job.run.checkpoint.save
    in_megatrons_form = choose_format(job.run.monitor.log_format, sys.stdout) == "reference"
    # Megatron-LM's form of the log ends with Megatron-LM's lines, unless there is a ledger over several starts.
    if save is not None or not in_megatrons_form:
        job.log.line(job.ledger.told())
    if save is None or in_megatrons_form:
        return
    lines = [f"the run lies in {save}{'' if saved else '; it has no checkpoint yet'}"]
    if not saved:
        lines.append("  begin:    the same command again")
    elif reason is not None:
        lines.append("  go on:    the same command again")
    else:
        lines.append(f"  longer:   the same command with {flags_of_a_longer_run(job)}")
    if saved:
        named = [(word, command.replace("{save}", shlex.quote(save))) for word, command in job.task.next_commands]
        lines += [f"  {word + ':':<9} {command}" for word, command in named]
    for line in lines:
        job.log.line(line)


def flags_of_a_longer_run(job: Job) -> str:
    """What makes a run twice as long as it is by now, in what its length is counted."""
    flag, length = "--train-iters", job.progress.step
    if job.run.train.train_samples is not None:
        flag, length = "--train-samples", job.progress.consumed_train_samples
    return f"{flag} {2 * length} --override-lr-scheduler"


def _tell_losses(job: Job) -> None:
    """The validation figures before and after, and what a predictor pays that has learnt almost nothing.

    Only the rank that speaks reads data for it.
    """
    if not job.run.evaluate.unigram_baseline or not job.validations or not job.log.speaks:
        return
    (first_step, first), (last_step, last) = job.validations[0], job.validations[-1]
    baseline = job.task.baseline(job.run, job.loaders["valid"].source)
    names = job.task.losses(job.run)
    name = names[0] if baseline is None else baseline.loss
    for figure in [name, *(other for other in names if other != name)]:
        before = f"{first[figure]:.3f} at step {first_step}, " if last_step > first_step else ""
        job.log.line(f"validation {_spoken(figure)}: {before}{last[figure]:.3f} at step {last_step}")
    if baseline is not None:
        gap = baseline.value - last[name]
        job.log.line(
            f"{baseline.title}: {baseline.value:.3f}, {baseline.meaning}; "
            f"the model is {abs(gap):.3f} {'below' if gap >= 0 else 'above'} it"
        )


def _spoken(loss: str) -> str:
    """The main loss is just the loss."""
    return "loss" if loss == "lm loss" else loss


def _tell_sample(job: Job) -> None:
    """What the model makes of --sample-prompt. Every rank takes part."""
    prompt, tokenizer = job.run.evaluate.sample_prompt, job.tokenizer
    if prompt is None or tokenizer is None or job.run.task != "gpt":
        return
    layout, shape = job.layout, shape_of(job.run.model)
    # Of every layout alike; a model may have places beyond the training's sequences, but has learnt nothing there.
    ids, window = prompt_ids(tokenizer, prompt), sequence_length(job.run)
    num_new = min(SAMPLE_TOKENS, window - len(ids))
    if num_new < 1:
        job.log.line(
            f"no sample: --sample-prompt has {len(ids)} tokens, which leave none of the {window} of a sequence"
        )
        return
    sampling = Sampling(temperature=0.7, top_p=0.95)
    model = job.laid.parts.get(0)
    if layout.world_size == 1 and isinstance(model, Decoder):
        text = continuations(model, tokenizer, [prompt], max_new_tokens=num_new, sampling=sampling)[0].text
    else:
        dtype = "float32" if job.run.model.fp32_residual_connection else compute_dtype(job.run)
        tokens = continue_together(
            job.laid.parts,
            layout,
            job.groups,
            ids,
            max_new_tokens=num_new,
            window=window,
            stream=(shape.width, getattr(torch, dtype)),
            sampling=sampling,
            vocab_size=tokenizer.vocab_size,
            eod=eod_of(tokenizer),
            device=job.device,
        )
        text = tokenizer.decode(tokens)
    job.log.line("a sample (the prompt is the first line's beginning):")
    for line in shown(prompt + text).splitlines():
        job.log.line(f"  | {line}")

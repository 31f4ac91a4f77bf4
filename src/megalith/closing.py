"""What a run leaves a person with: what was learnt, a sample of it, and how to go on."""

import sys

import numpy as np
import torch

from megalith.data.causal import CausalBatches, CausalDataset
from megalith.derived import compute_dtype, sequence_length
from megalith.evaluate.generate import Sampling
from megalith.evaluate.laid import continue_together
from megalith.evaluate.loss import unigram_entropy
from megalith.evaluate.talk import continuations, eod_of, prompt_ids, shown
from megalith.job import Job
from megalith.models.decoder import Decoder
from megalith.models.shape import shape_of
from megalith.monitor.log import choose_format

SAMPLE_TOKENS = 120
MOST_COUNTED = 20_000_000  # tokens looked at for the frequencies


def tell_what_next(job: Job, reason: str | None) -> None:
    """Say what was learnt, show a sample, and name the commands that go on from here. Every rank calls it."""
    if reason is None:
        _tell_losses(job)
        _tell_sample(job)
    save = job.run.checkpoint.save
    # Megatron-LM's form of the log ends with Megatron-LM's lines.
    if save is None or choose_format(job.run.monitor.log_format, sys.stdout) == "reference":
        return
    lines = [f"the run lies in {save}"]
    if reason is not None:
        lines.append("  go on:    the same command again")
    else:
        lines.append(f"  longer:   the same command with --train-iters {2 * job.last_step} --override-lr-scheduler")
    if job.run.task == "gpt":
        lines.append(f'  talk:     megalith generate {save} --prompt "..."')
        lines.append(f"  measure:  megalith evaluate {save}")
    for line in lines:
        job.log.line(line)


def _tell_losses(job: Job) -> None:
    """The validation loss before and after, and what the best predictor without context pays."""
    if not job.run.evaluate.unigram_baseline or not job.validations:
        return
    (first_step, first), (last_step, last) = job.validations[0], job.validations[-1]
    name = job.task.losses[0]
    entropy = _entropy_of(job.loaders["valid"].source)
    if last_step > first_step:
        job.log.line(f"validation loss: {first[name]:.3f} at step {first_step}, {last[name]:.3f} at step {last_step}")
    else:
        job.log.line(f"validation loss: {last[name]:.3f} at step {last_step}")
    if entropy is not None:
        job.log.line(
            f"unigram entropy: {entropy:.3f}, the loss of knowing how often each token occurs and nothing else; "
            f"the model is {entropy - last[name]:.3f} below it"
        )


def _entropy_of(source: object) -> float | None:
    """Nats per token of the validation documents' frequencies; None for data that is no single corpus."""
    if not isinstance(source, CausalBatches) or not isinstance(source.rows, CausalDataset):
        return None
    dataset = source.rows
    documents = np.unique(np.asarray(dataset.maps.doc_idx))
    parts = [dataset.indexed.read(int(document)) for document in documents]
    tokens = np.concatenate(parts)[:MOST_COUNTED]
    return unigram_entropy(tokens)


def _tell_sample(job: Job) -> None:
    """What the model makes of --sample-prompt. Every rank takes part."""
    prompt = job.run.evaluate.sample_prompt
    if prompt is None:
        return
    layout, shape = job.layout, shape_of(job.run.model)
    sampling = Sampling(temperature=0.7, top_p=0.95)
    model = job.laid.parts.get(0)
    if layout.world_size == 1 and isinstance(model, Decoder):
        text = continuations(model, job.tokenizer, [prompt], max_new_tokens=SAMPLE_TOKENS, sampling=sampling)[0]
    else:
        dtype = "float32" if job.run.model.fp32_residual_connection else compute_dtype(job.run)
        tokens = continue_together(
            job.laid.parts,
            layout,
            job.groups,
            prompt_ids(job.tokenizer, prompt),
            max_new_tokens=SAMPLE_TOKENS,
            window=sequence_length(job.run),
            stream=(shape.width, getattr(torch, dtype)),
            sampling=sampling,
            vocab_size=job.tokenizer.vocab_size,
            eod=eod_of(job.tokenizer),
            device=job.device,
        )
        text = job.tokenizer.decode(tokens)
    job.log.line("a sample (the prompt is the first line's beginning):")
    for line in shown(prompt + text).splitlines():
        job.log.line(f"  | {line}")

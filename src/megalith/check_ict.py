"""What is checked for bi-encoders alone: blocks and titles, towers, and what they start from."""

from collections.abc import Iterator
from pathlib import Path

from megalith.check_files import named_file_faults
from megalith.config import Fault, Run, fault, flag_of
from megalith.data.indexed import bin_path, idx_path
from megalith.data.marked import FEWEST_TOKENS
from megalith.derived import given_length, retriever_length


def ict_faults(run: Run) -> Iterator[Fault]:
    """Every fault of an ICT's settings."""
    yield from biencoder_faults(run)
    data = run.data
    name, length = given_length(run)
    if length is not None and 0 < length < FEWEST_TOKENS:
        rule = "has no room for a text between its marks"
        yield fault(name, length, rule, f"Give at least {FEWEST_TOKENS}")
    if not 0 <= data.query_in_block_prob <= 1:
        yield fault("query_in_block_prob", data.query_in_block_prob, "must be from 0 to 1", "Give a share")
    if data.mock_data or data.corpus is not None:
        if data.titles_data_path is not None:
            other = "mock_data" if data.mock_data else "corpus"
            rule = f"stands beside {flag_of(other)}, which brings its own"
            yield fault("titles_data_path", data.titles_data_path, rule, "Leave one out")
        return
    if data.data_path and len(data.data_path) > 1:
        rule = f"has {len(data.data_path)} words; titles belong to the documents of one file, so ict takes one prefix"
        yield fault(
            "data_path", " ".join(data.data_path), rule, "Give one; megalith preprocess makes one of several --input"
        )
    if data.titles_data_path is None:
        remedy = "Add --titles-data-path PREFIX, of a file with the title of each document"
        yield fault("titles_data_path", None, "is required by ict and was not given", remedy)
    elif not (idx_path(data.titles_data_path).exists() and bin_path(data.titles_data_path).exists()):
        rule = "is no prefix of a token file (.bin and .idx)"
        yield fault("titles_data_path", data.titles_data_path, rule, "Correct the path")


def retriever_faults(run: Run) -> Iterator[Fault]:
    """Every fault of a supervised retriever's settings."""
    yield from biencoder_faults(run)
    data = run.data
    yield from named_file_faults(run)
    if data.train_with_neg and data.train_hard_neg == 0:
        yield fault("train_with_neg", None, "adds no passage while --train-hard-neg = 0", "Raise that")
    if data.train_hard_neg and not data.train_with_neg:
        yield fault("train_hard_neg", data.train_hard_neg, "changes nothing without --train-with-neg", "Add that")


def biencoder_faults(run: Run) -> Iterator[Fault]:
    """Every fault of the settings that all bi-encoders share."""
    model, evaluate, checkpoint = run.model, run.evaluate, run.checkpoint
    stages = run.parallel.pipeline_model_parallel_size
    if stages > 1:
        rule = "cuts one stack of layers, and a bi-encoder has two that meet in the loss only"
        yield fault("pipeline_model_parallel_size", stages, rule, "Use tensor or data parallelism")
    length, places = retriever_length(run), model.max_position_embeddings
    if places is not None and length > places:
        rule = f"is longer than --max-position-embeddings = {places}"
        yield fault("retriever_seq_length", length, rule, "Shorten it")
    if model.biencoder_projection_dim < 0:
        value = model.biencoder_projection_dim
        yield fault("biencoder_projection_dim", value, "must not be negative", "Give a width, or 0 for none")
    if not 0 < run.data.sample_rate <= 1:
        yield fault("sample_rate", run.data.sample_rate, "must be above 0 and at most 1", "Give such a share")
    counts = evaluate.retriever_report_topk_accuracies
    if any(k < 1 for k in counts) or len(set(counts)) < len(counts):
        shown = " ".join(map(str, counts))
        yield fault("retriever_report_topk_accuracies", shown, "takes numbers above 0, each once", "Correct them")
    if checkpoint.bert_load is not None:
        if not Path(checkpoint.bert_load).is_dir():
            yield fault("bert_load", checkpoint.bert_load, "is not a directory", "Name the run directory of a bert")
        if checkpoint.load is not None and not checkpoint.loads_own:
            yield fault("bert_load", checkpoint.bert_load, "contradicts --load: both give weights", "Leave one out")

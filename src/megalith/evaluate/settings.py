"""Settings: how often and how long a run is evaluated."""

from dataclasses import dataclass

from megalith.fields import setting


@dataclass(frozen=True)
class EvaluateConfig:
    """How often and how long a run is evaluated."""

    eval_interval: int = setting(1000, "iterations between validations", section="validation", unit="steps")
    eval_iters: int = setting(100, "iterations per evaluation", section="validation", unit="batches")
    embedding_path: str | None = setting(
        None,
        "file of the passages' embeddings, which megalith index writes",
        section="biencoder",
        task="ict, retriever",
    )
    indexer_batch_size: int = setting(
        128, "intended indexer batch", section="biencoder", unit="passages", task="ict, retriever"
    )
    indexer_log_interval: int = setting(
        1000, "indexer progress interval in batches", section="biencoder", unit="batches", task="ict, retriever"
    )
    retriever_report_topk_accuracies: tuple[int, ...] = setting(
        (), "top-k values to report", section="biencoder", repeat="+", task="ict, retriever"
    )
    retriever_score_scaling: bool = setting(
        False, "divide scores by sqrt(hidden_size)", section="biencoder", switch="on", task="ict, retriever"
    )
    eval_first: bool = setting(False, "evaluate before the first step too", section="validation", switch="on")
    unigram_baseline: bool = setting(
        False,
        "say at the end what predicting by token frequencies alone would have cost",
        section="validation",
        switch="on",
    )
    sample_prompt: str | None = setting(None, "continue this text at the end, and show it", section="validation")

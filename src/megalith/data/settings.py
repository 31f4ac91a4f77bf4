"""Settings: where the data is and how samples are cut from it."""

from dataclasses import dataclass

from megalith.fields import setting


@dataclass(frozen=True)
class DataConfig:
    """Where the data is and how samples are cut from it."""

    data_path: tuple[str, ...] | None = setting(
        None,
        "one prefix, or weight prefix weight prefix ...",
        section="data and dataloader",
        repeat="*",
        also=("--train-data-path",),
    )
    valid_data_path: tuple[str, ...] | None = setting(
        None,
        "data sets of which all documents are for validation, given as --data-path is",
        section="data and dataloader",
        repeat="*",
        usual="a share of --data-path, by --split",
        task="gpt, bert, t5",
    )
    test_data_path: tuple[str, ...] | None = setting(
        None,
        "data sets of which all documents are for the test, given as --data-path is",
        section="data and dataloader",
        repeat="*",
        usual="a share of --data-path, by --split",
        task="gpt, bert, t5",
    )
    mock_data: bool = setting(
        False, "train on made-up tokens, for measuring; needs no files", section="data and dataloader", switch="on"
    )
    vocab_size: int | None = setting(
        None, "ids of the made-up tokens, before padding", section="data and dataloader", usual="50257"
    )
    split: str = setting("969, 30, 1", "train/valid/test proportions", section="data and dataloader")
    vocab_file: str | None = setting(None, "vocabulary file", section="data and dataloader")
    merge_file: str | None = setting(None, "BPE merges", section="data and dataloader")
    vocab_extra_ids: int = setting(
        0,
        "tokens appended to a BERT vocabulary",
        section="data and dataloader",
        task="bert, t5, ict, classify, retriever",
    )
    tokenizer_type: str | None = setting(
        None,
        "GPT2BPETokenizer, BertWordPieceLowerCase, BertWordPieceCase, HuggingFaceTokenizer, SentencePieceTokenizer or "
        "ByteLevelTokenizer",
        section="data and dataloader",
        usual="GPT2BPETokenizer for gpt, else BertWordPieceLowerCase",
    )
    seq_length: int | None = setting(None, "tokens per sample", section="data and dataloader", unit="tokens")
    encoder_seq_length: int | None = setting(None, "encoder length", section="data and dataloader", unit="tokens")
    decoder_seq_length: int | None = setting(
        None, "T5 decoder length", section="data and dataloader", unit="tokens", task="t5"
    )
    retriever_seq_length: int = setting(
        256,
        "retriever sequence length; if left alone, no more than the model has positions",
        section="data and dataloader",
        unit="tokens",
        task="ict, retriever",
    )
    sample_rate: float = setting(
        1.0,
        "sub-sample retriever data (accepted; megalith index takes it)",
        section="data and dataloader",
        task="ict, retriever",
    )
    pairs_format: str | None = setting(
        None,
        "how the files of pairs of sentences are laid out",
        section="classification",
        choices=("MNLI", "QQP"),
        task="classify",
    )
    train_data: tuple[str, ...] | None = setting(
        None,
        "files of pairs, or of questions, to learn from",
        section="classification",
        repeat="+",
        task="classify, retriever",
    )
    valid_data: tuple[str, ...] | None = setting(
        None,
        "files of pairs, or of questions, to validate on",
        section="classification",
        repeat="+",
        task="classify, retriever",
    )
    train_with_neg: bool = setting(
        False,
        "learn from passages that do not answer a question too",
        section="biencoder",
        switch="on",
        task="retriever",
    )
    train_hard_neg: int = setting(
        0, "hard ones of these for a question", section="biencoder", unit="passages", task="retriever"
    )
    val_av_rank_hard_neg: int = setting(
        30, "hard wrong passages for a question in validation", section="biencoder", unit="passages", task="retriever"
    )
    val_av_rank_other_neg: int = setting(
        30, "other wrong passages for a question in validation", section="biencoder", unit="passages", task="retriever"
    )
    mask_prob: float = setting(0.15, "masked-LM probability", section="data and dataloader", task="bert, t5")
    short_seq_prob: float = setting(
        0.1, "chance of a shortened BERT/T5 sample", section="data and dataloader", task="bert, t5"
    )
    mmap_warmup: bool = setting(False, "read mmap files once at start", section="data and dataloader", switch="on")
    num_workers: int = setting(
        2,
        "threads that decode images (accepted; one thread makes all other samples)",
        section="data and dataloader",
        unit="processes",
    )
    data_impl: str = setting(
        "infer",
        "reader of token files (accepted; all are memory-mapped)",
        section="data and dataloader",
        choices=("lazy", "cached", "mmap", "infer"),
    )
    dataloader_type: str | None = setting(
        None,
        "single pass or cyclic",
        section="training",
        usual="cyclic for vit, classify and retriever, else single",
        choices=("single", "cyclic"),
    )
    reset_position_ids: bool = setting(False, "restart positions after EOD", section="data and dataloader", switch="on")
    reset_attention_mask: bool = setting(
        False, "block attention across EOD", section="data and dataloader", switch="on"
    )
    eod_mask_loss: bool = setting(
        False, "zero the loss where the input token is EOD", section="data and dataloader", switch="on"
    )
    titles_data_path: str | None = setting(None, "ICT titles dataset", section="biencoder", task="ict")
    block_data_path: str | None = setting(
        None, "old REALM block data (accepted; nothing reads it)", section="biencoder", task="ict"
    )
    evidence_data_path: str | None = setting(None, "Wikipedia evidence TSV", section="biencoder", task="ict, retriever")
    use_one_sent_docs: bool = setting(
        False, "ICT: allow one-sentence documents", section="biencoder", switch="on", task="ict"
    )
    query_in_block_prob: float = setting(
        0.1, "ICT: chance the query stays in its block", section="biencoder", task="ict"
    )
    tokenizer_model: str | None = setting(
        None, "tokenizer.json or SentencePiece model, for the tokenizers that need one", section="data and dataloader"
    )
    data_cache_path: str | None = setting(
        None,
        "directory for index maps and large blends, where the data's own is read-only",
        section="data and dataloader",
    )
    corpus: str | None = setting(
        None,
        "train on text that is already on this machine, with a tokenizer trained on it (python), or on drawn images",
        section="data and dataloader",
        choices=("python", "shapes"),
    )
    corpus_vocab_size: int = setting(
        4096, "size of the tokenizer trained on --corpus", section="data and dataloader", unit="tokens"
    )
    image_augmentation: str = setting(
        "all",
        "what is random in a training image: crop, flip and colours, the first two, or nothing",
        section="vit",
        choices=("all", "crop", "none"),
        task="vit",
    )
    verify_data: bool = setting(
        False,
        "before the start, read all token files and hold them against the digests that preprocessing recorded",
        section="data and dataloader",
        switch="on",
    )
    max_epochs: int = setting(
        20000,
        "refuse to start where the training data would be read more often than this",
        section="data and dataloader",
        unit="passes",
    )

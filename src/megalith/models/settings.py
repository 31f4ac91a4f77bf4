"""Settings: what the model is."""

from dataclasses import dataclass

from megalith.fields import setting


@dataclass(frozen=True)
class ModelConfig:
    """What the model is."""

    num_layers: int | None = setting(None, "transformer layers", section="network size", unit="layers")
    hidden_size: int | None = setting(None, "model width", section="network size", unit="features")
    ffn_hidden_size: int | None = setting(
        None,
        "MLP inner width",
        section="network size",
        usual="4 x hidden size, with --swiglu 2/3 of that in whole 64s",
        unit="features",
    )
    num_attention_heads: int | None = setting(None, "attention heads", section="network size")
    kv_channels: int | None = setting(
        None, "per-head width", section="network size", usual="hidden size / heads", unit="features per head"
    )
    max_position_embeddings: int | None = setting(
        None, "rows of the position table; the longest sequence", section="network size", unit="tokens"
    )
    make_vocab_size_divisible_by: int = setting(
        128, "vocabulary padding multiple", section="network size", unit="tokens"
    )
    layernorm_epsilon: float = setting(1e-05, "epsilon of all norms", section="network size", also=("--norm-epsilon",))
    apply_residual_connection_post_layernorm: bool = setting(
        False, "take the residual from the LayerNorm output", section="network size", switch="on"
    )
    norm_after_residual: bool = setting(
        False,
        "LayerNorm after each residual sum and the embeddings, as the original BERT has it",
        section="network size",
        switch="on",
        task="bert, ict, classify, retriever",
    )
    # Of Llama and of Hugging Face's T5; the names are Megatron-LM's of later years where it has the same.
    normalization: str = setting(
        "LayerNorm", "kind of all norms", section="network size", choices=("LayerNorm", "RMSNorm"), task="gpt, t5"
    )
    add_bias_linear: bool = setting(
        True,
        "no biases in the linear layers of blocks",
        section="network size",
        flag="--disable-bias-linear",
        switch="off",
        task="gpt, t5",
    )
    add_qkv_bias: bool = setting(
        False,
        "biases of queries, keys and values with --disable-bias-linear, as in Qwen2",
        section="network size",
        switch="on",
        task="gpt",
    )
    qk_layernorm: bool = setting(
        False,
        "norms of each head's queries and keys before they turn, one weight for all heads of a layer, as in Qwen3",
        section="network size",
        switch="on",
        task="gpt",
    )
    activation_function: str = setting(
        "gelu",
        "of the feed-forward: gelu or relu between two matrices, gated-gelu with a third",
        section="network size",
        choices=("gelu", "relu", "gated-gelu"),
        task="gpt, t5",
    )
    swiglu: bool = setting(
        False,
        "a feed-forward of three matrices with a SiLU gate, as Llama has it",
        section="network size",
        switch="on",
        task="gpt, t5",
    )
    position_embedding_type: str = setting(
        "learned_absolute",
        "a table of positions; rope (gpt): queries and keys turn with their place; relative (t5): a bias of each head "
        "by the distance of query and key, one table for each stack",
        section="network size",
        choices=("learned_absolute", "rope", "relative"),
        values={"--use-rotary-position-embeddings": "rope"},
        task="gpt, t5",
    )
    rotary_base: float = setting(
        10000.0,
        "what the angles of rope fall by from a head's first features to its last",
        section="network size",
        task="gpt",
    )
    rotary_percent: float = setting(
        1.0, "share of a head's features that rope turns", section="network size", task="gpt"
    )
    use_rope_scaling: bool = setting(
        False,
        "slower angles of rope for long texts, as in Llama 3.1",
        section="network size",
        switch="on",
        task="gpt",
    )
    rope_scaling_factor: float = setting(
        8.0, "how much slower the slowest angles are with --use-rope-scaling", section="network size", task="gpt"
    )
    group_query_attention: bool = setting(
        False,
        "heads share keys and values in --num-query-groups groups",
        section="network size",
        switch="on",
        task="gpt",
    )
    num_query_groups: int = setting(
        1, "heads of keys and values with --group-query-attention", section="network size", task="gpt"
    )
    openai_gelu: bool = setting(False, "tanh GELU with --no-bias-gelu-fusion too", section="network size", switch="on")
    onnx_safe: bool | None = setting(
        None,
        "the form of the erf GELU for ONNX; true whatever TEXT is (accepted; nothing is exported)",
        section="network size",
    )
    bert_binary_head: bool = setting(
        True,
        "leave out BERT's sentence-order head, pooler and token types",
        section="network size",
        flag="--bert-no-binary-head",
        switch="off",
        task="bert, classify",
    )
    attention_dropout: float = setting(0.1, "dropout on attention probabilities", section="regularization")
    hidden_dropout: float = setting(0.1, "dropout on embeddings and residual branches", section="regularization")
    init_method_std: float = setting(0.02, "std of the normal init", section="initialization")
    init_method_xavier_uniform: bool = setting(False, "Xavier init", section="initialization", switch="on", task="vit")
    apply_query_key_layer_scaling: bool = setting(
        True,
        "do not divide QK^T by the layer number, to undo it inside an fp32 softmax",
        section="mixed precision",
        flag="--no-query-key-layer-scaling",
        switch="off",
    )
    attention_softmax_in_fp32: bool = setting(
        False, "fp32 softmax of attention (accepted; it always is)", section="mixed precision", switch="on"
    )
    fp32_residual_connection: bool = setting(False, "fp32 residual stream", section="mixed precision", switch="on")
    fp16_lm_cross_entropy: bool = setting(False, "loss in fp16", section="mixed precision", switch="on")
    bias_gelu_fusion: bool = setting(
        True,
        "the erf form of GELU instead of the tanh form",
        section="training",
        flag="--no-bias-gelu-fusion",
        switch="off",
    )
    bias_dropout_fusion: bool = setting(
        True,
        "do not fuse bias, dropout and residual (accepted; nothing is fused by hand)",
        section="training",
        flag="--no-bias-dropout-fusion",
        switch="off",
    )
    masked_softmax_fusion: bool = setting(
        True,
        "do without CUDA masked-softmax kernels (accepted; PyTorch's own fused kernels run)",
        section="training",
        flag="--no-masked-softmax-fusion",
        switch="off",
    )
    ict_head_size: int | None = setting(
        None, "old ICT head size (accepted; use --biencoder-projection-dim)", section="biencoder", task="ict"
    )
    biencoder_projection_dim: int = setting(
        0, "extra projection of the bi-encoder embedding (0 = none)", section="biencoder", task="ict, retriever"
    )
    biencoder_shared_query_context_model: bool = setting(
        False, "one tower for query and context", section="biencoder", switch="on", task="ict, retriever"
    )
    img_dim: int = setting(224, "ViT image side", section="vit", unit="pixels", task="vit")
    num_channels: int = setting(3, "ViT image channels", section="vit", task="vit")
    num_classes: int = setting(1000, "ViT classes", section="vit", task="vit")
    patch_dim: int = setting(16, "ViT patch side", section="vit", unit="pixels", task="vit")
    untie_embeddings_and_output_weights: bool = setting(
        False, "give the output layer a table of its own", section="network size", switch="on"
    )
    # Of T5 alone.
    softmax_scale: float | None = setting(
        None, "what attention scores are multiplied by", section="t5", task="t5", usual="1 / sqrt(kv_channels)"
    )
    relative_attention_num_buckets: int = setting(
        32, "rows of a table of distances", section="t5", unit="distances", task="t5"
    )
    relative_attention_max_distance: int = setting(
        128, "from here on all distances share a row", section="t5", unit="tokens", task="t5"
    )
    output_bias: bool = setting(
        True, "no bias of the scores of tokens", section="t5", flag="--disable-output-bias", switch="off", task="t5"
    )
    scale_decoder_outputs: bool = setting(
        False,
        "divide what the decoder gives by sqrt(hidden_size) before it is scored",
        section="t5",
        switch="on",
        task="t5",
    )

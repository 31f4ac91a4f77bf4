"""megatron-core's GPTModel with its local layers, on the CPU: what it asks of torch.cuda is answered for a device 0."""

import os
from collections.abc import Callable

import torch
import torch.distributed
from protocol import asked_size, serve
from torch._C._distributed_c10d import HashStore

size = asked_size()
torch.manual_seed(size.seed)


def nothing() -> Callable[..., None]:
    """A function of its own for every place: the compiler keeps rules by function."""
    return lambda *args, **kwargs: None


# megatron-core reads and seeds a CUDA device's generators; on this machine the processor's stand in for them.
torch.cuda.is_available = lambda: False
torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
torch.cuda.set_device = nothing()
torch.cuda.manual_seed = nothing()
torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
torch.cuda.set_rng_state = nothing()
torch.cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
torch.cuda.random.set_rng_state = nothing()
torch.cuda.synchronize = nothing()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
tensor_parallel.model_parallel_cuda_manual_seed(size.seed, force_reset_rng=True)
config = TransformerConfig(
    num_layers=size.num_layers,
    hidden_size=size.hidden_size,
    num_attention_heads=size.num_heads,
    use_cpu_initialization=True,
    pipeline_dtype=torch.float32,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    add_bias_linear=True,
    bias_activation_fusion=True,
    bias_dropout_fusion=True,
    masked_softmax_fusion=False,
    gradient_accumulation_fusion=False,
    persist_layer_norm=False,
)
model = GPTModel(
    config=config,
    transformer_layer_spec=get_gpt_layer_local_spec(),
    vocab_size=size.vocab_size,
    max_sequence_length=size.sequence_length,
    share_embeddings_and_output_weights=True,
    position_embedding_type="learned_absolute",
)
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
generator = torch.Generator().manual_seed(size.seed)
positions = torch.arange(size.sequence_length).expand(size.batch_size, -1)
mask = torch.ones(1, 1, size.sequence_length, size.sequence_length).triu(1).bool()


def step() -> float:
    tokens = torch.randint(size.vocab_size, (size.batch_size, size.sequence_length + 1), generator=generator)
    losses = model(tokens[:, :-1].contiguous(), positions, mask, labels=tokens[:, 1:].contiguous())
    loss = losses.mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


serve(step, num_parameters=sum(p.numel() for p in model.parameters()), threads=torch.get_num_threads())

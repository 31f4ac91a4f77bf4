"""litgpt's GPT: learned tables tied, LayerNorm, GELU, biases; its positions are rotary, for it has no others."""

import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy
from protocol import asked_size, serve

size = asked_size()
torch.manual_seed(size.seed)
config = Config(
    name="peer",
    block_size=size.sequence_length,
    vocab_size=size.vocab_size,
    padded_vocab_size=size.vocab_size,
    n_layer=size.num_layers,
    n_head=size.num_heads,
    n_embd=size.hidden_size,
    rotary_percentage=1.0,
    parallel_residual=False,
    bias=True,
    lm_head_bias=False,
    norm_class_name="LayerNorm",
    mlp_class_name="GptNeoxMLP",
    gelu_approximate="tanh",
)
model = GPT(config)
model.lm_head.weight = model.transformer.wte.weight
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.02)
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
forward = torch.compile(model) if size.mode == "compiled" else model
generator = torch.Generator().manual_seed(size.seed)


def step() -> float:
    tokens = torch.randint(size.vocab_size, (size.batch_size, size.sequence_length + 1), generator=generator)
    # As its pretraining script does: logits of all tokens, then the loss over chunks of 128 of them.
    loss = chunked_cross_entropy(forward(tokens[:, :-1]), tokens[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


serve(step, num_parameters=sum(p.numel() for p in model.parameters()), threads=torch.get_num_threads())

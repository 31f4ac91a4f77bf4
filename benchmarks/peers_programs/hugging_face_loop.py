"""A plain PyTorch loop around Hugging Face's GPT2LMHeadModel, as a tutorial would write it."""

import torch
from protocol import asked_size, serve
from transformers import GPT2Config, GPT2LMHeadModel

size = asked_size()
torch.manual_seed(size.seed)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=size.vocab_size,
        n_positions=size.sequence_length,
        n_embd=size.hidden_size,
        n_layer=size.num_layers,
        n_head=size.num_heads,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
)
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
forward = torch.compile(model) if size.mode == "compiled" else model
generator = torch.Generator().manual_seed(size.seed)


def step() -> float:
    tokens = torch.randint(size.vocab_size, (size.batch_size, size.sequence_length), generator=generator)
    loss = forward(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


serve(step, num_parameters=sum(p.numel() for p in model.parameters()), threads=torch.get_num_threads())

"""A plain PyTorch loop around Hugging Face's GPT2LMHeadModel, as a tutorial would write it."""

import torch
from hugging_face_model import make_gpt2
from protocol import asked_size, serve

size = asked_size()
model = make_gpt2(size)
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
forward = torch.compile(model) if size.mode == "compiled" else model
generator = torch.Generator().manual_seed(size.seed)


def step() -> float:
    tokens = torch.randint(size.vocab_size, (size.batch_size, size.sequence_length), generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=size.bf16):
        loss = forward(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


serve(step, num_parameters=sum(p.numel() for p in model.parameters()), threads=torch.get_num_threads())

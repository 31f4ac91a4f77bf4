"""The model that both of Hugging Face's programs train."""

import torch
from protocol import Size
from transformers import GPT2Config, GPT2LMHeadModel


def make_gpt2(size: Size) -> torch.nn.Module:
    """A GPT-2 without dropout, with the first weights of the seed."""
    torch.manual_seed(size.seed)
    return GPT2LMHeadModel(
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

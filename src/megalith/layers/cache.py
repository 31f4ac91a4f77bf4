"""Keys and values of tokens already seen, so that generation computes each token once.

Every row has its own length: token t of row b lies in slot t, whatever its neighbours' lengths. So rows of different
lengths need no padding in front, and places are positions.

Shape letters: B batch, H heads, T new tokens, S slots, K head width.
"""

import torch
from torch import Tensor

from megalith.layers.mask import Mask


class KeyValueCache:
    """Keys and values of up to num_slots tokens per row, for all layers that ask; memory is taken at their first use.

    lengths: tokens that each row holds. A forward pass writes T new ones behind them; `advance` then says how many of
    these are real. What lies behind a row's length is never seen and is overwritten later.
    """

    def __init__(self, num_rows: int, num_slots: int, *, device: torch.device) -> None:
        self.num_slots = num_slots
        self.lengths = [0] * num_rows
        self.lengths_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of a layer; return all of them, BHSK, S up to the longest row's new end."""
        num_new = k_BHTK.shape[2]
        if layer not in self._kept:
            batch, heads, _, head_width = k_BHTK.shape
            shape = (batch, heads, self.num_slots, head_width)
            self._kept[layer] = (k_BHTK.new_zeros(shape), v_BHTK.new_zeros(shape))
        end = self._end(num_new)
        slots_B1T1 = (self.lengths_B[:, None] + torch.arange(num_new, device=k_BHTK.device))[:, None, :, None]
        kept_k, kept_v = self._kept[layer]
        kept_k.scatter_(2, slots_B1T1.expand_as(k_BHTK), k_BHTK)
        kept_v.scatter_(2, slots_B1T1.expand_as(v_BHTK), v_BHTK)
        return kept_k[:, :, :end], kept_v[:, :, :end]

    def mask(self, num_new: int) -> Mask:
        """What T new tokens behind the ones held see: their own row's slots up to their own."""
        if not any(self.lengths):
            return Mask(causal=True)
        slots_S = torch.arange(self._end(num_new), device=self.lengths_B.device)
        places_BT = self.lengths_B[:, None] + slots_S[:num_new]
        return Mask(causal=True, visible=slots_S <= places_BT[:, None, :, None])

    def advance(self, counts: list[int]) -> None:
        """Count the first counts[b] of the tokens written last as row b's."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.lengths_B += torch.tensor(counts, device=self.lengths_B.device)

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.lengths_B.device)
        self.lengths, self.lengths_B = [self.lengths[row] for row in rows], self.lengths_B[index]
        self._kept = {layer: (k[index], v[index]) for layer, (k, v) in self._kept.items()}

    def _end(self, num_new: int) -> int:
        end = max(self.lengths, default=0) + num_new
        if end > self.num_slots:
            raise ValueError(f"{end} tokens do not fit a cache of {self.num_slots}: make it larger or stop earlier")
        return end

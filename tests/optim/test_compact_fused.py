"""The update in one kernel does what the plain one does: on a GPU, or in Triton's interpreter on the CPU."""

import pytest
import torch

from megalith.optim import compact
from megalith.optim.compact import BLOCK, MOMENTS, CompactAdamW
from tests.layers.kernels import DEVICE, runs_kernels
from tests.optim.test_compact import KINDS, Odd, odd, optimizer_of, train

# More spans than one: elements that are updated at once.
SPAN = 2 * BLOCK


def trained(kind: str, *, fused: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Odd, CompactAdamW]:
    monkeypatch.setattr(compact, "takes_one_pass", lambda weights, gradient: fused)
    monkeypatch.setattr(compact, "CHUNK", {"cpu": SPAN, "cuda": SPAN})
    model = odd().to(DEVICE)
    optimizer = optimizer_of(model, kind)
    assert isinstance(optimizer, CompactAdamW)
    train(model, optimizer, range(1, 6))
    return model, optimizer


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_one_kernel_updates_as_the_formula_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, of_plain = trained(kind, fused=False, monkeypatch=monkeypatch)
    model, optimizer = trained(kind, fused=True, monkeypatch=monkeypatch)
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert not torch.equal(found, odd().to(DEVICE).get_parameter("weight")) or found.numel() < BLOCK
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
        for moment in MOMENTS:
            kept, wanted = optimizer.unpacked(found, moment), of_plain.unpacked(expected, moment)
            # The same random words: other roundings are those of a last bit in what is rounded, or in a block's scale.
            assert torch.isclose(kept, wanted, rtol=1e-6, atol=0).float().mean() > 0.97
            scale = wanted.abs().max()
            assert ((kept - wanted).abs() <= (2**-7 if kind == "bf16" else 2**-5) * scale).all()


@runs_kernels
def test_what_is_beside_the_stretch_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalith.optim.compact_fused import update

    flat = torch.ones(3 * BLOCK, device=DEVICE)
    first, second = ({"values": torch.zeros(3 * BLOCK, dtype=torch.bfloat16, device=DEVICE)} for _ in range(2))
    hashes = torch.arange(3 * BLOCK, dtype=torch.int32, device=DEVICE)
    part = slice(BLOCK, 2 * BLOCK - 7)
    update(
        flat[part],
        torch.full_like(flat, 2.0)[part],
        first,
        second,
        start=BLOCK,
        block=BLOCK,
        hashes=hashes,
        words=(-5, 1 << 30),
        decay=0.5,
        size=0.0,
        root=1.0,
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
    )
    changed = torch.zeros(3 * BLOCK, dtype=torch.bool, device=DEVICE)
    changed[part] = True
    assert torch.equal(flat, torch.where(changed, 0.5, 1.0))
    for kept, value in ((first, 0.2), (second, 0.04)):
        assert torch.equal(kept["values"] != 0, changed)
        torch.testing.assert_close(
            kept["values"][part].float(), torch.full((BLOCK - 7,), value, device=DEVICE), rtol=2**-7, atol=0
        )

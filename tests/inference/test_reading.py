from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyrolora.adapters.sites import AdapterError
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.reading import Reader
from tests.programs import language_posterior, tiny_llama

TEXTS = [[5, 9, 3, 7], [8, 4]]  # new tokens come behind, others for each draw


def starts(size: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, TEXTS))
    tokens = torch.tensor([[0] * (longest - len(text)) + text for text in TEXTS])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in TEXTS])
    return tokens.expand(size, -1, -1), mask


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj", "lm_head"]])
@pytest.mark.parametrize("size", [1, 3])
@torch.no_grad()
def test_a_reader_by_brute_force(size: int, targets: list[str]) -> None:
    """Law: what S draws say after each of their texts is ``log softmax`` of each draw's whole forward pass over each
    text, without cache, padding or other rows; texts of the draws may differ."""
    posterior = language_posterior(MeanField(random="*"), tiny_llama(), target_modules=targets)
    program, draws = posterior.program, posterior.draw(size)
    program.model.eval()
    reader = Reader(program, draws, len(TEXTS))
    texts = [[list(text) for text in TEXTS] for _ in range(size)]
    new, mask = starts(size)
    for step in range(3):
        found = reader(new[:1] if step == 0 else new, mask)
        for s in range(size):
            with program.placed({name: value[s] for name, value in draws.items()}):
                for n, text in enumerate(texts[s]):
                    expected = program.model(input_ids=torch.tensor([text])).logits[0, -1].log_softmax(-1)
                    torch.testing.assert_close(found[s, n], expected, atol=2e-4, rtol=1e-4)
        new = torch.arange(size * 2).view(size, 2, 1) + 10 * (step + 1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], -1)
        texts = [[[*text, int(new[s, n])] for n, text in enumerate(own)] for s, own in enumerate(texts)]
    assert size == 1 or (found[0] - found[1]).abs().max() > 0.1


def test_what_several_draws_cannot_read() -> None:
    """Law: adapted embeddings are read by one draw, and refused to several."""
    posterior = language_posterior(MeanField(random="*"), target_modules=["embed_tokens"])
    tokens, mask = starts(1)
    assert Reader(posterior.program, posterior.draw(1), 2)(tokens, mask).shape[:2] == (1, 2)
    with pytest.raises(AdapterError, match="embed_tokens"):
        Reader(posterior.program, posterior.draw(2), 2)

"""Maximum a posteriori: a point estimate of every site under the declared priors."""

from __future__ import annotations

from pyrolora.guides.base import Card, Guide


class MAP(Guide):
    """``θ* = argmax Σ_n log p(y_n | x_n, θ) + log p(θ)``: a Delta at every site.

    With `priors.Flat` everywhere it is plain LoRA: the same steps as PEFT with AdamW and no weight decay. Scales of
    hierarchical priors stay at their prior medians, because the joint mode over scale and weights is degenerate.

    Source: Hu et al. 2022 (LoRA), with flat priors.
    """

    card = Card("nothing", "1 a step", "1")

    def __init__(self) -> None:
        super().__init__(random=())

"""What generation with a weight posterior gives: texts, what each token's doubt is made of, how far draws disagree."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor


@dataclass(frozen=True)
class Word:
    """One word of a generated text; its tokens' numbers summed, in nats.

    By the chain rule ``log p`` of a word is the sum over its tokens. So is the mutual information of word and weights,
    whose terms are here those along the text that was generated.

    Attributes:
        start, end: Where it stands in the text.
        log_prob: ``Σ_t log p(w_t | w_<t)``.
        mutual_information: ``Σ_t I_t``.
    """

    start: int
    end: int
    log_prob: float
    mutual_information: float


@dataclass(frozen=True)
class GeneratedText:
    """One generated text of T tokens, the end-of-text token included where it came. Uncertainties are in nats.

    All numbers are of the distribution before the sampling temperature, ``p(w_t | w_<t) = Σ_s π_s(t) p_s(w_t | w_<t)``.

    Attributes:
        prompt: What it continues.
        text: The continuation, without special tokens.
        tokens: Their ids, ``(T,)``.
        pieces: What each token adds to the text; together they are the text.
        log_prob: ``log p(w_t | w_<t)`` of the tokens, ``(T,)``.
        entropy: Total uncertainty about each next token, ``H[Σ_s π_s p_s]``, ``(T,)``.
        expected_entropy: Aleatoric part ``Σ_s π_s H[p_s]``, ``(T,)``.
        effective_draws: ``1 / Σ_s π_s(t)²``, from S (all count the same) to 1 (one is left), ``(T,)``.
    """

    prompt: str
    text: str
    tokens: Tensor
    pieces: tuple[str, ...]
    log_prob: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    effective_draws: Tensor

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic part ``I[w_t; θ | w_<t] = H[E p] − E H[p]`` of each token, ``(T,)``, never below zero."""
        return (self.entropy - self.expected_entropy).clamp(min=0)

    def words(self) -> list[Word]:
        """The words between white space; a token counts for each word that it has a part in."""
        ends = list(itertools.accumulate(len(piece) for piece in self.pieces))
        # The first bytes of a character add nothing yet; they belong to the character that comes.
        spans = [
            (end - len(piece), max(end, end - len(piece) + 1)) for end, piece in zip(ends, self.pieces, strict=True)
        ]
        found = []
        for match in re.finditer(r"\S+", self.text):
            start, end = match.span()
            own = [t for t, (a, b) in enumerate(spans) if _shows(self.text[max(a, start) : min(b, end)])]
            numbers = (float(values[own].sum()) for values in (self.log_prob, self.mutual_information))
            found.append(Word(start, end, *numbers))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        numbers = ("log_prob", "entropy", "expected_entropy", "mutual_information", "effective_draws")
        plain = {name: getattr(self, name).tolist() for name in numbers}
        return {"text": self.text, "tokens": self.tokens.tolist(), "pieces": list(self.pieces), **plain}


@dataclass(frozen=True)
class Disagreement:
    """How far the texts of S draws for one prompt differ, over all S(S−1)/2 pairs; 0 for a single draw.

    Attributes:
        differing: Fraction of the pairs whose tokens are not the same, ``2/(S(S−1)) Σ_{s<r} 1[w^s ≠ w^r]``.
        edit_distance: ``2/(S(S−1)) Σ_{s<r} d(w^s, w^r) / max(T_s, T_r)``, d the Levenshtein distance in tokens.
    """

    differing: float
    edit_distance: float


@dataclass(frozen=True)
class Generation:
    """What a posterior generates for some prompts.

    Attributes:
        texts: For each prompt one text of the mixture, or one text of each draw.
        how: ``"mixture"`` or ``"draws"``.
        weights: ``"predictive"`` or ``"uniform"``.
        num_draws: S; 1 also for mean weights and point estimates, whose mutual information is 0.
    """

    texts: tuple[tuple[GeneratedText, ...], ...]
    how: str
    weights: str
    num_draws: int

    @property
    def disagreement(self) -> tuple[Disagreement, ...] | None:
        """Of the draws, for each prompt; None for a mixture."""
        if self.how != "draws":
            return None
        return tuple(disagreement([text.tokens.tolist() for text in texts]) for texts in self.texts)

    def __iter__(self) -> Iterator[tuple[GeneratedText, ...]]:
        return iter(self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    def to_pandas(self) -> pd.DataFrame:
        """One row for each token: prompt and text (numbered), its piece, and its numbers."""
        rows = []
        for i, texts in enumerate(self.texts):
            for s, text in enumerate(texts):
                columns = {name: values for name, values in text.to_dict().items() if name != "text"}
                frame = pd.DataFrame({"prompt": i, "draw": s, **columns})
                rows.append(frame.rename(columns={"tokens": "token", "pieces": "piece"}))
        return pd.concat(rows, ignore_index=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        prompts: list[dict[str, Any]] = [
            {"prompt": texts[0].prompt, "texts": [text.to_dict() for text in texts]} for texts in self.texts
        ]
        for row, found in zip(prompts, self.disagreement or (), strict=False):
            row["disagreement"] = {"differing": found.differing, "edit_distance": found.edit_distance}
        return {"how": self.how, "weights": self.weights, "num_draws": self.num_draws, "prompts": prompts}

    def __repr__(self) -> str:
        information = torch.cat([text.mutual_information for texts in self.texts for text in texts])
        return (
            f"Generation({len(self)} prompts, {self.how} of {self.num_draws} draws; {len(information)} tokens, mean "
            f"mutual information {information.mean():.4f} nats)"
        )


def disagreement(sequences: Sequence[Sequence[int]]) -> Disagreement:
    """`Disagreement` of the token sequences of some draws."""
    pairs = list(itertools.combinations(sequences, 2))
    distances = [edit_distance(a, b) / max(len(a), len(b), 1) for a, b in pairs]
    count = max(len(pairs), 1)
    return Disagreement(sum(d > 0 for d in distances) / count, sum(distances) / count)


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and substitutions that make ``b`` of ``a``."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _shows(part: str) -> bool:
    return bool(part.strip())

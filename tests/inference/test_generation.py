from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torchmetrics.functional.text import edit_distance as peer

from pyrolora.inference.generation import Disagreement, GeneratedText, Generation, disagreement, edit_distance


def text(pieces: list[str], information: list[float], tokens: list[int] | None = None) -> GeneratedText:
    size = len(pieces)
    return GeneratedText(
        prompt="so",
        text="".join(pieces),
        tokens=torch.tensor(tokens or list(range(size))),
        pieces=tuple(pieces),
        log_prob=-torch.arange(1.0, size + 1),
        entropy=torch.tensor(information) + 2,
        expected_entropy=torch.full((size,), 2.0),
        effective_draws=torch.ones(size),
    )


def test_disagreement_by_hand() -> None:
    """Law: of three texts two are the same; abcd and abxd differ in one of four tokens, abcd and ab in two of four."""
    assert disagreement([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 9, 4]]) == Disagreement(2 / 3, (0 + 1 / 4 + 1 / 4) / 3)
    assert disagreement([[1, 2, 3, 4], [1, 2]]) == Disagreement(1.0, 2 / 4)
    assert disagreement([[1, 2], [1, 2]]) == disagreement([[5]]) == Disagreement(0.0, 0.0)
    assert disagreement([[1, 2], [3, 4, 5]]).edit_distance == 1.0


def test_edit_distance() -> None:
    """Law: Levenshtein's distance is torchmetrics'; it is symmetric, and to nothing it is the length."""
    generator = np.random.default_rng(0)
    for _ in range(30):
        a, b = (generator.integers(97, 101, generator.integers(0, 9)).tolist() for _ in range(2))
        expected = peer(["".join(map(chr, a))], ["".join(map(chr, b))], reduction=None)
        assert edit_distance(a, b) == edit_distance(b, a) == int(expected[0])
    assert edit_distance([], [1, 2]) == 2


def test_words() -> None:
    """Law: a word has the sums over its tokens; first bytes of a character belong to it; white space and special tokens
    belong to none."""
    #                 1     2       3    4    5     6     7
    found = text([" un", "known", " ", "", "é,", " end", ""], [0.1, 0.2, 9.0, 0.5, 0.25, 0.0, 9.0])
    words = found.words()
    assert [found.text[w.start : w.end] for w in words] == ["unknown", "é,", "end"]
    assert [w.log_prob for w in words] == [-3.0, -9.0, -6.0]
    assert [w.mutual_information for w in words] == pytest.approx([0.3, 0.75, 0.0], abs=1e-6)
    assert text(["a b", "c"], [0.5, 0.25]).words()[0].mutual_information == pytest.approx(0.5)
    assert text(["", " "], [1.0, 1.0]).words() == []


def test_information_is_never_negative() -> None:
    """Law: rounding does not make mutual information negative."""
    assert text(["a"], [-1e-6]).mutual_information.item() == 0


def test_tables() -> None:
    """Law: a row for each token; JSON has the same numbers, and disagreement where there are draws."""
    draws = (text([" a", " b"], [0.5, 0.0], [1, 2]), text([" a"], [0.25], [1]))
    found = Generation((draws,), how="draws", weights="predictive", num_draws=2)
    table = found.to_pandas()
    assert list(zip(table["draw"], table["token"], table["piece"], strict=True)) == [
        (0, 1, " a"),
        (0, 2, " b"),
        (1, 1, " a"),
    ]
    assert table["mutual_information"].tolist() == [0.5, 0.0, 0.25]
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["prompts"][0]["disagreement"] == {"differing": 1.0, "edit_distance": 0.5}
    assert plain["prompts"][0]["texts"][0]["mutual_information"] == [0.5, 0.0]
    mixture = Generation(((draws[0],),), how="mixture", weights="uniform", num_draws=2)
    assert mixture.disagreement is None and "disagreement" not in mixture.to_dict()["prompts"][0]
    assert repr(mixture).startswith(
        "Generation(1 prompts, mixture of 2 draws; 2 tokens, mean mutual information 0.2500"
    )

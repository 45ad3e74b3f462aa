"""Frozen features: what they average, what they ignore, and that nothing trains them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyrolora.guides.features import frozen_features
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from tests.guides.test_mean_field import multiple_choice
from tests.programs import linear_gaussian, lora, tiny_bert, tiny_program


def short_batch(left: int = 0, right: int = 0) -> dict[str, Tensor]:
    """Two texts of four tokens, with padding around them."""
    ids = torch.tensor([[101, 2204, 3000, 102], [101, 2919, 3147, 102]])
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
    return {"input_ids": torch.nn.functional.pad(ids, (left, right)), "attention_mask": mask}


def test_embedding_is_the_mean_over_real_tokens() -> None:
    """Law: the mean of the word embeddings by hand, whatever the padding and its side."""
    program = tiny_program()
    features, width = frozen_features(program, "embedding")
    table = program.model.get_base_model().get_input_embeddings().weight
    by_hand = table[short_batch()["input_ids"]].mean(1)
    assert width == 16 and torch.allclose(features(short_batch()), by_hand)
    for padded in (short_batch(left=3), short_batch(right=5)):
        assert torch.allclose(features(padded), by_hand, atol=1e-6)
    assert not features(short_batch()).requires_grad


def test_backbone_is_the_mean_of_the_frozen_models_last_hidden_state() -> None:
    """Law: transformers' own last hidden state, without adapters, dropout or padding; all modes and slots are left."""
    program = tiny_program(dropout=0.5)
    features, width = frozen_features(program, "backbone")
    for name, parameter in program.model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.5
    hidden = tiny_bert(dropout=0.5).eval().bert(**short_batch()).last_hidden_state
    program.model.train()
    assert width == 16 and torch.allclose(features(short_batch()), hidden.mean(1), atol=1e-6)
    assert torch.allclose(features(short_batch(right=5)), hidden.mean(1), atol=1e-5)
    assert program.model.training and not program.running


@pytest.mark.parametrize("kind", ["embedding", "backbone"])
def test_an_example_is_all_its_choices(kind: str) -> None:
    """Law: multiple choice has one feature vector for an example: the mean over its choices."""
    program, batch = multiple_choice()
    program.model.eval()
    features, width = frozen_features(program, kind)  # type: ignore[arg-type]
    found = features(batch)
    one = {name: value[:, :1] for name, value in batch.items() if name != "labels"}
    assert found.shape == (4, width) and torch.allclose(found, features(one), atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_adapted_embeddings_are_taken_without_their_adapter() -> None:
    """Law: a model whose embedding is adapted gives the frozen table's features."""
    config = lora(target_modules=["word_embeddings", "query"])
    program = PyroLoRA(tiny_bert(), config, priors={"*": Normal(1.0)}, likelihood=Categorical(2), num_data=4)
    plain, _ = frozen_features(tiny_program(), "embedding")
    features, _ = frozen_features(program, "embedding")
    for name, parameter in program.model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.5
    assert torch.equal(features(short_batch()), plain(short_batch()))


def test_models_without_tokens_give_their_input() -> None:
    """Law: without token embeddings the floating-point input is the feature, its mean where it has several rows."""
    truth = linear_gaussian()
    features, width = frozen_features(truth.program, "embedding")
    assert width == 4 and torch.equal(features(truth.batch), truth.batch["x"])
    several = torch.randn(3, 5, 4)
    assert torch.allclose(features({"labels": torch.zeros(3), "x": several}), several.mean(1))
    with pytest.raises(ValueError, match="floating-point input of width 4"):
        features({"x": torch.randn(3, 7)})
    with pytest.raises(ValueError, match="transformers model"):
        frozen_features(truth.program, "backbone")

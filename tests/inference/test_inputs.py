"""What a guide says of each input: whole data sets in their own order, in predictions, tables and ArviZ."""

from __future__ import annotations

import numpy as np
import torch

from pyrolora.guides.input_adaptive import InputAdaptive
from pyrolora.guides.map import MAP
from pyrolora.inference.inputs import describe_inputs
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from tests.programs import sentence_task, tiny_program

NAMES = ["lora.query.A.alpha", "lora.value.A.alpha"]


def fitted() -> Posterior:
    program = tiny_program()
    guide = InputAdaptive()
    guide.bind(program)
    with torch.no_grad(), isolated(0):
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return Posterior(program, guide.eval())


def test_rows_are_in_the_order_of_the_data() -> None:
    """Law: row n is the guide's α of example n alone, though batches are made by length."""
    posterior = fitted()
    data = sentence_task().test
    found = describe_inputs(posterior.program, posterior.guide, data, batch_size=5)
    assert list(found) == NAMES
    for n in range(len(data)):
        alone = posterior.guide.describe_inputs(sentence_task().collate([data[n]]))
        assert all(torch.allclose(found[name][n], alone[name][0], atol=1e-6) for name in NAMES)


def test_guides_without_local_latents_say_nothing() -> None:
    """Law: other guides' predictions and trees have no numbers of the inputs."""
    program = tiny_program()
    guide = MAP()
    guide.bind(program)
    posterior = Posterior(program, guide)
    assert describe_inputs(program, guide, sentence_task().test) == {}
    assert posterior.predict(sentence_task().test, 2).inputs == {}
    assert "constant_data" not in posterior.to_datatree(sentence_task().test, num_draws=2)


def test_they_stand_in_predictions_and_in_arviz() -> None:
    """Law: α of every layer is in the prediction, its mean in the table, and in constant_data with named dimensions."""
    posterior = fitted()
    prediction = posterior.predict(sentence_task().test, 4)
    table, tree = prediction.to_pandas(), posterior.to_datatree(sentence_task().test, num_draws=3)
    for name in NAMES:
        alpha = prediction.inputs[name]
        assert alpha.shape == (12, 2) and (alpha > 0).all() and alpha.std(0).min() > 1e-3
        assert np.allclose(table[name], alpha.mean(-1))
        assert tree["constant_data"][name].dims == ("example", "layer")
        assert np.allclose(tree["constant_data"][name], alpha)
    assert tree["log_likelihood"]["labels"].shape == (1, 3, 12)
    spread = tree["log_likelihood"]["labels"].std("draw")
    assert float(spread.min()) > 0

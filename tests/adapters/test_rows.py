from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from pyrolora.adapters.noise import changed_outputs
from pyrolora.adapters.placement import Placement
from pyrolora.adapters.rows import row_changes
from pyrolora.adapters.sites import AdapterError, find_sites

# Embeddings, expert parameters, heads with a bias, tokens of all rows in one (OPT).
REFUSED = {"llama-embeddings", "mixtral-experts", "bert", "roberta", "distilbert", "vit", "t5", "opt"}


def draw(placement: Placement, size: int) -> dict[str, Tensor]:
    return {name: 0.5 * torch.randn(size, *site.shape) for name, site in placement.sites.items()}


def beside(model: PeftModel, draws: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """Logits of all draws from one pass, ``(S, b, K)``."""
    size, examples = len(next(iter(draws.values()))), len(next(iter(inputs.values())))
    changes = row_changes(model, find_sites(model), draws, examples)
    with torch.no_grad(), changed_outputs(model, changes):
        logits = model(**{name: torch.cat([value] * size) for name, value in inputs.items()}).logits
    return logits.unflatten(0, (size, examples))


def test_each_row_sees_its_own_draw(architecture, request: pytest.FixtureRequest) -> None:
    """Law: one pass of S·b rows gives the logits of S passes, each with one draw placed on the model; afterwards no
    hook is left and no bit has changed. Where that cannot be, an error says so, and leaves none either."""
    model = architecture.inject()
    placement = Placement(model, find_sites(model))
    draws, inputs = draw(placement, 3), dict(architecture.inputs)
    if request.node.callspec.params["architecture"] in REFUSED:
        with pytest.raises(AdapterError, match="run draw by draw"):
            beside(model, draws, inputs)
        assert not any(module._forward_hooks for module in model.modules())
        return
    with torch.no_grad():
        before = model(**inputs).logits
        rows = []
        for s in range(3):
            with placement.placed({name: value[s] for name, value in draws.items()}):
                rows.append(model(**inputs).logits)
        found = beside(model, draws, inputs)
        torch.testing.assert_close(found, torch.stack(rows), rtol=1e-4, atol=1e-5)
        assert (found[0] - found[1]).abs().max() > 1e-2
        assert torch.equal(model(**inputs).logits, before)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("architecture", ["bert", "mixtral-experts"], indirect=True)
def test_some_sites_alone(architecture) -> None:
    """Law: sites without a draw keep the model's own value, whatever they are: a head, adapted experts."""
    model = architecture.inject()
    placement = Placement(model, find_sites(model))
    draws = {
        name: value for name, value in draw(placement, 3).items() if name.startswith(("lora.q_proj", "lora.query"))
    }
    found = beside(model, draws, dict(architecture.inputs))
    for s in range(3):
        with torch.no_grad(), placement.placed({name: value[s] for name, value in draws.items()}):
            expected = model(**architecture.inputs).logits
        torch.testing.assert_close(found[s], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama"], indirect=True)
@pytest.mark.parametrize("shape", [(10, 16), (5, 2, 16), (2, 5, 16)])
def test_rows_that_nobody_can_tell_are_refused(architecture, shape: tuple[int, ...]) -> None:
    """Law: a map that does not see S·b rows of tokens, as where tokens are routed, raises and changes nothing."""
    model = architecture.inject()
    sites = find_sites(model)
    changes = row_changes(model, sites, draw(Placement(model, sites), 3), 2)
    path, change = changes[0]
    with (
        pytest.raises(AdapterError, match="not all rows of 3 draws; run draw by draw"),
        changed_outputs(model, changes),
    ):
        model.get_submodule(path)(torch.randn(shape))
    assert change(torch.randn(6, 5, 16), torch.empty(0)).shape == (6, 5, 2)
    assert not any(module._forward_hooks for module in model.modules())

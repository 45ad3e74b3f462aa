"""Ensembles: the uniform mixture of fits that differ in start and in the order of the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from pyrolora.guides.base import Guide
from pyrolora.guides.ensemble import Ensemble, restarted
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.input_adaptive import InputAdaptive
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from tests.programs import sentence_task, tiny_bert, tiny_program, untrained

INNER = {"MAP": MAP(), "MeanField": MeanField(), "Inducing": Inducing(), "Laplace": Laplace()}


def arguments(folder: Path, *, seed: int = 0, **options: object) -> TrainingArguments:
    chosen: dict = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.05, "save_strategy": "no"}
    fixed: dict = {"output_dir": str(folder), "report_to": "none", "seed": seed, "disable_tqdm": True}
    return TrainingArguments(**fixed, **{**chosen, **options})


def points(size: int) -> Posterior:
    """Untrained members at different random places."""
    return untrained(Ensemble(MAP(), size))


@pytest.mark.parametrize("name", INNER)
def test_one_member_is_that_guide(name: str, tmp_path: Path) -> None:
    """Law: an ensemble of one is its member, to the bit: the same fit, the same predictions."""
    program, test = tiny_program(), sentence_task().test
    alone = fit(program, INNER[name], args=arguments(tmp_path, seed=3))
    one = fit(program, Ensemble(INNER[name], 1), args=arguments(tmp_path, seed=3))
    assert torch.equal(one.predict(test, 5).log_mean, alone.predict(test, 5).log_mean)
    assert all(torch.equal(value, one.mean()[site]) for site, value in alone.mean().items())
    assert one.guide.random_sites() == alone.guide.random_sites()


def test_the_prediction_is_the_mean_of_the_members() -> None:
    """Law: p(y|x) = (1/M) Σ_m p_m(y|x), whatever number of draws is asked for; points take M passes."""
    posterior, test = points(3), sentence_task().test
    members = [Posterior(posterior.program, part).predict(test).mean for part in posterior.guide.parts()]
    for asked in (1, 3, 16):
        prediction = posterior.predict(test, asked)
        assert torch.allclose(prediction.mean, torch.stack(members).mean(0), atol=1e-6)
    assert posterior.predict(test, 2).num_draws == posterior.guide.passes(2, 2) == posterior.guide.draws_for(2) == 3
    assert posterior.guide.draws_for(0) == posterior.guide.passes(0, 2) == 1


def test_members_of_posteriors_count_the_same() -> None:
    """Law: draws are rounded up to a multiple of M, and draw s is of member s mod M."""
    posterior = untrained(Ensemble([MAP(), MeanField()]))
    assert posterior.predict(sentence_task().test, 5).num_draws == 6
    draws = posterior.draw(6)["lora.query.A"]
    point = posterior.guide.parts()[0].mean()["lora.query.A"]
    assert [bool((draw == point).all()) for draw in draws] == [True, False] * 3


def test_an_ensemble_of_ensembles_is_one_of_all_members() -> None:
    """Law: draws of a nested ensemble run through all of its members, each as often."""
    posterior = untrained(Ensemble(Ensemble(MAP(), 2), 3))
    draws = posterior.draw(12)["head.classifier.bias"].flatten(1)
    assert len(torch.unique(draws[:6], dim=0)) == 6
    assert torch.equal(draws[:6], draws[6:])


def test_members_that_predict_otherwise_are_mixed_in_probability(tmp_path: Path) -> None:
    """Law: with a linearised member too, the predictive is the mean of the members' predictives."""
    program, test = tiny_program(), sentence_task().test
    posterior = fit(program, Ensemble([Laplace(num_points=8), MAP(), MeanField()]), args=arguments(tmp_path))
    laplace, point, _ = posterior.guide.parts()
    assert laplace.is_fitted
    own = [Posterior(program, part).predict(test, 4).mean for part in (laplace, point)]
    draws = posterior.predict(test, 12).draws.exp()
    thirds = draws.reshape(3, len(draws) // 3, *draws.shape[1:]).mean(1)
    assert torch.allclose(thirds[0], own[0], atol=1e-6) and torch.allclose(thirds[1], own[1], atol=1e-6)
    assert not posterior.guide.joint_draws and not torch.allclose(thirds[2], own[1], atol=1e-4)
    assert posterior.guide.saw_validation(program) and not point.saw_validation(program)


def test_members_with_local_variables(tmp_path: Path) -> None:
    """Law: fit trains them one by one, the prediction is the members' mean; Pyro's own SVI is refused in words."""
    mixed = Ensemble([InputAdaptive(predictive="example"), MAP()])
    whole = fit(tiny_program(), mixed, args=arguments(tmp_path))
    assert isinstance(whole.guide, Ensemble) and whole.guide.averages
    test = sentence_task().validation
    assert test is not None
    prediction = whole.predict(test, 4, seed=1)
    assert prediction.draws is not None and prediction.num_draws == 4
    last = Posterior(whole.program, whole.guide.parts()[1]).predict(test, 0)
    torch.testing.assert_close(prediction.draws[2:].exp(), last.mean.expand(2, -1, -1), atol=1e-5, rtol=1e-4)
    assert (prediction.draws[0] - prediction.draws[1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"pyrolora\.fit trains them one after another"):
        whole.guide.augmented(whole.program)


def test_members_differ_in_start_and_in_the_order_of_data(tmp_path: Path) -> None:
    """Law: fresh adapters start at other entries of the same distribution with ΔW = 0; data come in another order."""
    program = tiny_program()
    guide = Ensemble(MAP(), 3)
    with isolated(0):
        guide.bind(program)
    first, second, third = (part.mean() for part in guide.parts())
    current = program.placement.current()
    assert torch.equal(first["lora.query.A"], current["lora.query.A"])
    assert not torch.equal(second["lora.query.A"], third["lora.query.A"])
    assert torch.equal(second["lora.query.A"].flatten().sort().values, first["lora.query.A"].flatten().sort().values)
    assert not any(member["lora.query.B"].any() for member in (first, second, third))
    # A trained adapter has one start only, so that members differ by the order of their data alone.
    trained = moved(program)
    same = fit(trained, Ensemble(MAP(), 2), args=arguments(tmp_path, max_steps=1, learning_rate=1e-9))
    a, b = (part.mean()["lora.query.A"] for part in same.guide.parts())
    assert torch.allclose(a, b, atol=1e-6)
    apart = fit(trained, Ensemble(MAP(), 2), args=arguments(tmp_path, max_steps=1))
    a, b = (part.mean()["lora.query.A"] for part in apart.guide.parts())
    assert not torch.allclose(a, b, atol=1e-3)


def moved(program):  # type: ignore[no-untyped-def]
    """The program with an adapter that was trained before, B no longer zero."""
    for name, site in program.sites.items():
        for path, parameter in site.holders:
            if name.endswith(".B"):
                program.model.get_submodule(path)._parameters[parameter].data.fill_(0.1)
    program.latents = program._find_latents()
    return program


def test_only_fresh_adapters_start_again() -> None:
    """Law: weights that were trained, and initialisations that are no independent entries, stay."""
    program = tiny_program()
    assert not torch.equal(restarted(program).latents["lora.query.A"].start, program.latents["lora.query.A"].start)
    assert restarted(program).latents["head.classifier.weight"] is program.latents["head.classifier.weight"]
    program.model.peft_config["default"].init_lora_weights = "eva"
    assert restarted(program).latents["lora.query.A"] is program.latents["lora.query.A"]
    program.model.peft_config["default"].init_lora_weights = True
    trained = moved(program)
    assert restarted(trained).latents["lora.query.A"] is trained.latents["lora.query.A"]


@pytest.mark.parametrize("inner", [MAP(), MeanField(), [MAP(), MeanField()], Ensemble(MAP(), 2)])
def test_saves_loads_and_exports(inner: Guide | list[Guide], tmp_path: Path) -> None:
    """Law: a loaded ensemble predicts as the saved one; draw m exported is member m's draw."""
    posterior = untrained(Ensemble(inner, 2))
    posterior.save_pretrained(tmp_path / "saved")
    loaded = Posterior.from_pretrained(tmp_path / "saved", tiny_bert(), task=sentence_task())
    test = sentence_task().test
    assert torch.equal(loaded.predict(test, 4).log_mean, posterior.predict(test, 4).log_mean)
    posterior.export_peft(tmp_path / "adapter", draw=1)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_killed_fit_goes_on_with_the_member_that_it_was_at(tmp_path: Path) -> None:
    """Law: resuming ends at the same weights; finished members are not trained again."""
    program = tiny_program()
    options: dict = {"save_strategy": "steps", "save_steps": 1}
    whole = fit(program, Ensemble(MAP(), 2), args=arguments(tmp_path / "a", **options))
    fit(program, MAP(), args=arguments(tmp_path / "b" / "member-0", **options))
    resumed = fit(program, Ensemble(MAP(), 2), args=arguments(tmp_path / "b", **options), resume=True)
    for part, other in zip(whole.guide.parts(), resumed.guide.parts(), strict=True):
        assert all(torch.equal(value, other.mean()[site]) for site, value in part.mean().items())
    assert {row["member"] for row in whole.history} == {0, 1}


def test_describes_each_member_and_enters_the_tree() -> None:
    """Law: descriptions name the member; ArviZ sees as many draws of the likelihood as of the weights."""
    posterior = untrained(Ensemble(Inducing(), 2))
    assert {name.split(":")[0] for name in posterior.guide.describe()} == {"member 0", "member 1"}
    tree = posterior.to_datatree(sentence_task().test, 3)
    assert tree["posterior"].sizes["draw"] == tree["log_likelihood"].sizes["draw"] == 4


@pytest.mark.parametrize(("guide", "size"), [(MAP(), 0), ([MAP(), MAP()], 3), ([], None), (["MAP"], None)])
def test_refuses_what_is_no_ensemble(guide: object, size: int | None) -> None:
    """Law: sizes below one, guides that are none, and two numbers of members are errors."""
    with pytest.raises(ValueError, match="Ensemble: "):
        Ensemble(guide, size)  # type: ignore[arg-type]

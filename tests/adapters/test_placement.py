from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from pyrolora.adapters.placement import Placement
from pyrolora.adapters.sites import find_sites
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.elbo import Objective
from pyrolora.inference.predict import Runner, log_probabilities
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA

some = pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama-embeddings", "mixtral-experts"], indirect=True)


def placement_of(model: PeftModel) -> Placement:
    return Placement(model, find_sites(model))


def draw(placement: Placement, *batch: int) -> dict[str, Tensor]:
    return {name: 0.5 * torch.randn(*batch, *site.shape) for name, site in placement.sites.items()}


def program_of(model: PeftModel) -> PyroLoRA:
    return PyroLoRA(model, priors={"*": Normal(0.5)}, likelihood=Categorical(3), num_data=10)


def parameter(model: PeftModel, site: str, layer: str) -> torch.nn.Parameter:
    """PEFT's own parameter for one layer of a site, by the names that PEFT gives."""
    root = f"base_model.model.{layer}"
    if site.startswith("head."):
        return model.get_parameter(f"{root}.modules_to_save.default.{site.removeprefix(f'head.{layer}.')}")
    role = site[-1]
    if "embed" in site:
        return model.get_parameter(f"{root}.lora_embedding_{role}.default")
    inner = ".base_layer" if "gate_up_proj" in site else ""  # the second of two adapted parameters of one module
    return model.get_parameter(f"{root}{inner}.lora_{role}.default.weight")


def write(model: PeftModel, draws: dict[str, Tensor], layers: dict[str, tuple[str, ...]]) -> None:
    """Copies a draw into PEFT's parameters by hand."""
    with torch.no_grad():
        for site, value in draws.items():
            for i, layer in enumerate(layers[site]):
                parameter(model, site, layer).copy_(value[i])


def test_a_placed_draw_is_as_if_written_into_the_parameters(architecture):
    """Law: logits and gradients under placement are those of stock PEFT with these values in its parameters."""
    model, stock = architecture.inject(), architecture.inject()
    placement = placement_of(model)
    model.requires_grad_(False)
    layers = {name: site.layers for name, site in placement.sites.items()}
    draws = {name: value.requires_grad_() for name, value in draw(placement).items()}
    with placement.placed(draws):
        placed = model(**architecture.inputs).logits
    write(stock, draws, layers)
    written = stock(**architecture.inputs).logits
    torch.testing.assert_close(placed, written, rtol=1e-6, atol=1e-6)

    weights = torch.randn_like(placed)
    gradients = torch.autograd.grad((weights * placed).sum(), list(draws.values()))
    (weights * written).sum().backward()
    for (site, names), gradient in zip(layers.items(), gradients, strict=True):
        own = torch.stack([parameter(stock, site, layer).grad for layer in names])
        torch.testing.assert_close(gradient, own, rtol=1e-4, atol=1e-6, msg=lambda text, site=site: f"{site}: {text}")
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("raises", [False, True])
def test_the_model_is_bitwise_what_it_was(architecture, raises):
    """Law: after the block, also one that raised, the very same parameters are back and no bit has changed."""
    model = architecture.inject()
    placement = placement_of(model)
    before = model(**architecture.inputs).logits
    objects = {name: id(p) for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with placement.placed(draw(placement)):
            during = model(**architecture.inputs).logits
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert not torch.allclose(during, before)
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(model(**architecture.inputs).logits, before)


def test_vmap_over_draws_is_a_loop_over_draws(architecture):
    """Law: a batch of draws placed under vmap gives the logits of the draws placed one by one."""
    model = architecture.inject()
    placement = placement_of(model)
    draws = draw(placement, 3)

    def logits(values: dict[str, Tensor]) -> Tensor:
        with placement.placed(values):
            return model(**architecture.inputs).logits

    if "target_parameters" in architecture.lora:
        pytest.skip("adapted expert parameters: see the next test")
    with torch.no_grad():
        loop = torch.stack([logits({name: value[s] for name, value in draws.items()}) for s in range(3)])
        batched = torch.vmap(logits)(draws)
    torch.testing.assert_close(batched, loop, rtol=1e-4, atol=1e-5)
    assert (batched[0] - batched[1]).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ["mixtral-experts"], indirect=True)
@pytest.mark.parametrize("which", ["lora.experts.*", "lora.q_proj.*"])
def test_adapted_experts_are_refused_under_vmap_before_harm_is_done(architecture, which):
    """Law: what PEFT cannot do under vmap is refused at once, whichever sites are batched; the model still works."""
    model = architecture.inject()
    placement = placement_of(model)
    before = model(**architecture.inputs).logits
    draws = {name: value for name, value in draw(placement, 3).items() if name.startswith(which[:-1])}

    def logits(values: dict[str, Tensor]) -> Tensor:
        with placement.placed(values):
            return model(**architecture.inputs).logits

    with pytest.raises(RuntimeError, match=r"mlp\.experts: vmap cannot follow"):
        torch.vmap(logits)(draws)
    assert torch.equal(model(**architecture.inputs).logits, before)


@pytest.mark.parametrize("experts", ["adapted", "routed"])
def test_prediction_falls_back_to_a_loop_where_vmap_fails(experts):
    """Law: mixtures of experts that vmap cannot follow are predicted draw by draw, with the same numbers."""
    config = transformers.MixtralConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=20,
        num_local_experts=4,
        num_labels=3,
        pad_token_id=0,
        experts_implementation="eager" if experts == "routed" else None,
    )
    targets = {"target_parameters": ["mlp.experts.down_proj"]} if experts == "adapted" else {}
    model = get_peft_model(
        transformers.MixtralForSequenceClassification(config).eval(),
        LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", **targets),
    )
    program = program_of(model)
    draws = draw(program.placement, 3)
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]])}
    runner = Runner(program, draws, {}, vectorise=True)
    values = runner.evaluate(log_probabilities(program), batch)
    assert not runner.vectorise
    for s in range(3):
        with torch.no_grad(), program.placed({name: value[s] for name, value in draws.items()}):
            torch.testing.assert_close(values[s], model(**batch).logits.log_softmax(-1), rtol=1e-5, atol=1e-6)


def gradients(program: PyroLoRA, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the ELBO with two draws, taken after both were lifted off; same seed, same noise."""
    guide = MeanField(random="*")
    guide.bind(program)
    torch.manual_seed(1)
    Objective(program, guide, num_particles=2).train()(batch).backward()
    return {name: p.grad for name, p in guide.named_parameters()}


def test_activation_checkpointing_changes_no_gradient(architecture):
    """Law: recomputation in backward, after the draw was taken off, sees that same draw; later predictions vmap."""
    batch = {**architecture.inputs, "labels": torch.tensor([0, 2])}
    plain = gradients(program_of(architecture.inject().train()), batch)
    model = architecture.inject().train()
    program = program_of(model)
    program.enable_activation_checkpointing()
    calls: list[str] = []
    site = next(s for s in program.sites.values() if "embed" not in s.name)
    model.get_submodule(site.holders[0][0]).register_forward_hook(lambda *_: calls.append("forward"))
    recomputed = gradients(program, batch)
    assert len(calls) == 4  # two draws, each once forward and once again for backward
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 0

    model.eval()
    draws = draw(program.placement, 2)
    runner = Runner(program, draws, {}, vectorise=True)
    values = runner.evaluate(log_probabilities(program), batch)
    assert runner.vectorise == ("target_parameters" not in architecture.lora)
    one = Runner(program, draws, {}, vectorise=False).evaluate(log_probabilities(program), batch)
    torch.testing.assert_close(values, one, rtol=1e-4, atol=1e-5)


@some
def test_a_checkpointed_graph_may_be_differentiated_twice(architecture):
    """Law: the context of recomputation can be entered again, as for the Jacobian of several outputs."""
    batch = {**architecture.inputs, "labels": torch.tensor([0, 2])}
    rows = []
    for checkpointing in (False, True):
        program = program_of(architecture.inject().train())
        if checkpointing:
            program.enable_activation_checkpointing()
        torch.manual_seed(1)
        draws = {name: value.requires_grad_() for name, value in draw(program.placement).items()}
        logits = program.logits(draws, batch)
        values = list(draws.values())
        rows.append([torch.autograd.grad(logits[0, k], values, retain_graph=True) for k in range(3)])
    for plain, recomputed in zip(*rows, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["bert", "llama"], indirect=True)
@pytest.mark.parametrize("when", ["base", "peft", "hook too"])
def test_a_model_that_was_checkpointed_before_is_served_too(architecture, when):
    """Law: checkpointing that the user had turned on gives the same gradients, and leaves no hook that breaks vmap."""
    batch = {**architecture.inputs, "labels": torch.tensor([0, 2])}
    plain = gradients(program_of(architecture.inject().train()), batch)
    model = architecture.inject(checkpointing=when == "base")
    if when != "base":
        model.get_base_model().gradient_checkpointing_enable()
    if when == "hook too":
        model.enable_input_require_grads()
    program = program_of(model.train())
    recomputed = gradients(program, batch)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)
    model.eval()
    runner = Runner(program, draw(program.placement, 2), {}, vectorise=True)
    runner.evaluate(log_probabilities(program), batch)
    assert runner.vectorise


@some
def test_absent_sites_keep_the_models_own_values(architecture):
    """Law: placing some sites is placing these and the present values of the others."""
    model = architecture.inject()
    placement = placement_of(model)
    draws = draw(placement)
    name = next(iter(draws))
    with placement.placed({name: draws[name]}):
        partial = model(**architecture.inputs).logits
    with placement.placed({**placement.current(), name: draws[name]}):
        full = model(**architecture.inputs).logits
    torch.testing.assert_close(partial, full, rtol=1e-6, atol=1e-6)
    with placement.placed({}):
        own = model(**architecture.inputs).logits
    assert torch.equal(own, model(**architecture.inputs).logits) and not torch.allclose(own, partial)


@some
def test_current_values_are_the_parameters_stacked(architecture):
    """Law: current() stacks PEFT's parameters over layers, outside the graph, and under placement the draw."""
    model = architecture.inject()
    placement = placement_of(model)
    for name, value in placement.current().items():
        own = torch.stack([parameter(model, name, layer) for layer in placement.sites[name].layers])
        assert torch.equal(value, own) and not value.requires_grad
    draws = draw(placement)
    with placement.placed(draws):
        assert all(torch.equal(value, draws[name]) for name, value in placement.current().items())


def test_blocks_nest():
    """Law: an inner block ends with the outer draw in place, and the outer one with the model's own values."""
    model = small()
    placement = placement_of(model)
    own, outer, inner = placement.current(), draw(placement), draw(placement)
    with placement.placed(outer):
        with placement.placed({"lora.q_proj.A": inner["lora.q_proj.A"]}):
            assert torch.equal(placement.current()["lora.q_proj.A"], inner["lora.q_proj.A"])
            assert torch.equal(placement.current()["lora.q_proj.B"], outer["lora.q_proj.B"])
        assert all(torch.equal(value, outer[name]) for name, value in placement.current().items())
    again = placement.placed(outer)
    with again:
        with again:
            pass
        assert all(torch.equal(value, outer[name]) for name, value in placement.current().items())
    assert all(torch.equal(value, own[name]) for name, value in placement.current().items())


def small(dtype: torch.dtype = torch.float32) -> PeftModel:
    config = transformers.LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=20,
    )
    base = transformers.LlamaForCausalLM(config).to(dtype)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]), autocast_adapter_dtype=False)


def test_a_draw_takes_the_type_of_the_adapter():
    """Law: float32 draws serve a bfloat16 adapter, and their gradients are float32."""
    model = small(torch.bfloat16)
    placement = placement_of(model)
    draws = {name: value.requires_grad_() for name, value in draw(placement).items()}
    with placement.placed(draws):
        assert all(value.dtype == torch.bfloat16 for value in placement.current().values())
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    logits.float().square().sum().backward()
    assert all(value.grad.dtype == torch.float32 and value.grad.abs().max() > 0 for value in draws.values())


def test_a_copy_places_on_itself():
    """Law: a deep copy of a model with its placement leaves the original alone."""
    model = small()
    placement = placement_of(model)
    own = placement.current()
    other_model, other = copy.deepcopy((model, placement))
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    before = model(**batch).logits
    with other.placed(draw(other)):
        assert all(torch.equal(value, own[name]) for name, value in placement.current().items())
        assert torch.equal(model(**batch).logits, before)
        assert not torch.allclose(other_model(**batch).logits, before)


def test_draws_that_do_not_fit_are_refused_before_anything_is_placed():
    """Law: an unknown site or a wrong shape is an error that names the site, and nothing has been placed."""
    placement = placement_of(small())
    own, draws = placement.current(), draw(placement)
    with pytest.raises(ValueError, match=r"no site 'lora\.k_proj\.A' on this model; its sites are lora\.q_proj\.A"):
        placement.placed({**draws, "lora.k_proj.A": draws["lora.q_proj.A"]})
    with pytest.raises(ValueError, match=r"'lora\.q_proj\.B': a draw has shape \(2, 16, 2\), not \(2, 2, 16\)"):
        placement.placed({**draws, "lora.q_proj.B": draws["lora.q_proj.A"]})
    assert all(torch.equal(value, own[name]) for name, value in placement.current().items())

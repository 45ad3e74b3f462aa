from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pyrolora.adapters.head import narrowed_head
from pyrolora.guides.linearised import slices
from pyrolora.inference.predict import Runner
from pyrolora.likelihoods.answer_tokens import AnswerTokens
from pyrolora.likelihoods.base import Likelihood
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
TOKENS = (12, 3, 7, 20)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
TEXTS = [[5, 9, 3, 7, 11, 2], [8, 4, 6], [10], [1, 2, 3, 4]]

BASES: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, **SIZES)),
    "qwen3-tied": lambda: Qwen3ForCausalLM(
        Qwen3Config(vocab_size=40, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, **SIZES)
    ),
    "gpt2-tied": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, **dict.fromkeys(DROPOUT, 0.0))
    ),
    "phi-bias": lambda: PhiForCausalLM(PhiConfig(vocab_size=40, **SIZES)),
}
if STORIES.is_dir():
    BASES["stories260K"] = lambda: AutoModelForCausalLM.from_pretrained(STORIES)  # type: ignore[index]


def base(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = BASES[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if name != "stories260K":
                parameter.mul_(4.0)  # as initialised, all logits are near zero
        if model.lm_head.bias is not None:
            model.lm_head.bias.normal_()
    return model


def program(model: Any, *extra: str, **options: Any) -> PyroLoRA:
    gpt2 = isinstance(model, GPT2LMHeadModel)
    own = ["c_attn"] if gpt2 else ["q_proj", "v_proj"]
    options = {"target_modules": [*own, *extra], "task_type": "CAUSAL_LM", "fan_in_fan_out": gpt2, **options}
    config = LoraConfig(r=2, lora_alpha=4, **options)
    return PyroLoRA(model, config, priors={"*": Normal(0.3)}, likelihood=AnswerTokens(TOKENS), num_data=4)


def draw(program: PyroLoRA, seed: int = 1, *size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(*size, *s.shape, generator=generator) for name, s in program.sites.items()}


def padded(side: str) -> dict[str, Tensor]:
    longest = max(map(len, TEXTS))
    ids, mask = torch.zeros(len(TEXTS), longest, dtype=torch.long), torch.zeros(len(TEXTS), longest, dtype=torch.long)
    for n, text in enumerate(TEXTS):
        where = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        ids[n, where], mask[n, where] = torch.tensor(text), 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([2, 0, 1, 3])}
    return batch if side == "right" else {**batch, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def whole(program: PyroLoRA, values: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """The natural parameters from all logits of the model."""
    with program.placed(values):
        return Likelihood.evaluate(program.likelihood, program.model, batch)


def outputs(program: PyroLoRA, values: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> list[torch.Size]:
    """Shapes of what the output layer computes."""
    found = []
    head = program.model.get_base_model().get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: found.append(output.shape))
    program.logits(values, batch)
    hook.remove()
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BASES)
def test_the_logits_are_those_of_the_whole_vocabulary(name: str, side: str) -> None:
    """Law: K logits at the last real token of each row equal the full logits there; and no others are computed."""
    own = program(base(name))
    batch, values = padded(side), draw(own)
    found = own.logits(values, batch)
    torch.testing.assert_close(found, whole(own, values, batch), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, own.logits(values, padded("left")), atol=1e-4, rtol=1e-4)
    assert outputs(own, values, batch) == [torch.Size([4, 1, 4])] and found.std() > 0.1


@pytest.mark.parametrize(("extra", "options"), [(("lm_head",), {}), ((), {"modules_to_save": ["lm_head"]})])
def test_an_adapted_head_sees_fewer_positions(extra: tuple[str, ...], options: dict[str, Any]) -> None:
    """Law: where the output layer is adapted or trained, its draws reach the logits, and only positions are fewer."""
    own = program(base("llama"), *extra, **options)
    batch, values = padded("right"), draw(own)
    assert any("lm_head" in name for name in values)
    torch.testing.assert_close(own.logits(values, batch), whole(own, values, batch), atol=1e-5, rtol=1e-5)
    others = {name: value for name, value in values.items() if "lm_head" not in name}
    assert (own.logits(values, batch) - own.logits(others, batch)).abs().min() > 1e-4
    assert outputs(own, values, batch) == [torch.Size([4, 1, 40])]


class OwnLinear(nn.Linear):
    """A linear map whose weight is not as it looks, as that of a quantised one."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.weight)


def test_an_unknown_kind_of_head_keeps_its_weight() -> None:
    """Law: of a map that is not exactly nn.Linear no rows are taken."""
    model = base("llama")
    model.lm_head = OwnLinear(16, 40, bias=False)
    own = program(model)
    batch, values = padded("left"), draw(own)
    torch.testing.assert_close(own.logits(values, batch), whole(own, values, batch), atol=1e-5, rtol=1e-5)
    assert outputs(own, values, batch) == [torch.Size([4, 1, 40])]


def test_a_model_without_an_output_layer_runs_whole() -> None:
    """Law: where there is no output layer to narrow, the logits are taken from all."""
    model = BertModel(BertConfig(vocab_size=40, **SIZES)).eval()
    batch = padded("right")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    positions = batch["attention_mask"].sum(-1) - 1
    with torch.no_grad(), narrowed_head(model, positions, (3, 5)) as selected:
        hidden = model(**inputs).last_hidden_state
    assert torch.equal(selected(hidden), hidden[torch.arange(4), positions][:, [3, 5]])


@pytest.mark.parametrize("name", BASES)
def test_the_model_is_what_it_was(name: str) -> None:
    """Law: afterwards every parameter is the same object with the same contents and no hook is left, also after an
    error in the output layer."""
    own = program(base(name))
    before = {n: (p, p.clone()) for n, p in own.model.named_parameters(remove_duplicate=False)}
    head = own.model.get_base_model().get_output_embeddings()
    own.logits(draw(own), padded("left"))
    rows = torch.zeros(4, dtype=torch.long)
    with pytest.raises(RuntimeError), narrowed_head(own.model, rows, TOKENS):
        head(torch.zeros(4, 6, 3))
    after = dict(own.model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[n] is p and torch.equal(p, copy) for n, (p, copy) in before.items())
    assert not head._forward_pre_hooks and not head._forward_hooks


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2-tied"])
def test_gradients_agree(name: str, checkpointing: bool) -> None:
    """Law: gradients of the log-likelihood are those through the full logits, with activation checkpointing too."""
    own = program(base(name), *(["lm_head"] if name == "llama" else []))
    if checkpointing:
        own.enable_activation_checkpointing()
        own.model.train()
    batch = padded("left")
    found = []
    for run in (own.logits, lambda values, batch: whole(own, values, batch)):
        values = {n: v.requires_grad_() for n, v in draw(own).items()}
        own.likelihood.log_prob(run(values, batch), {}, batch).sum().backward()
        found.append({n: v.grad for n, v in values.items()})
    for n, gradient in found[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, found[1][n], atol=1e-5, rtol=1e-4, msg=n)


@pytest.mark.parametrize("extra", [(), ("lm_head",)])
def test_vmap_over_draws_is_the_loop(extra: tuple[str, ...]) -> None:
    """Law: vectorised over draws, the output layer gives each draw's own logits."""
    own = program(base("llama"), *extra)
    batch, draws = padded("right"), draw(own, 2, 3)
    together = Runner(own, draws, {}, vectorise=True).evaluate(own.logits, batch)
    one = [whole(own, {n: v[s] for n, v in draws.items()}, batch) for s in range(3)]
    torch.testing.assert_close(together, torch.stack(one), atol=1e-5, rtol=1e-4)


def test_half_precision_rounds_alike() -> None:
    """Law: in bfloat16 the logits differ from the full ones by no more than a rounding or two (2⁻⁸ relative)."""
    own = program(base("llama", torch.bfloat16))
    batch, values = padded("left"), draw(own)
    found, expected = own.logits(values, batch), whole(own, values, batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2**-7 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("extra", [(), ("lm_head",)])
def test_jacobians_agree(extra: tuple[str, ...]) -> None:
    """Law: the Jacobians that Laplace takes with hooks are those of the full logits by reverse mode."""
    own = program(base("llama"), *extra)
    batch = padded("left")
    values = {n: v.requires_grad_() for n, v in draw(own).items()}
    sites = list(own.sites.values())
    logits = whole(own, values, batch)
    for c, (mean, jacobian) in enumerate(slices(own, values, sites, batch)):
        torch.testing.assert_close(mean, logits.detach(), atol=1e-5, rtol=1e-4)
        for n in range(len(mean)):
            expected = torch.autograd.grad(logits[n, c], list(values.values()), retain_graph=True)
            for name, gradient in zip(values, expected, strict=True):
                torch.testing.assert_close(jacobian[name][:, n], gradient, atol=1e-5, rtol=1e-4)


def test_peft_models_and_plain_ones() -> None:
    """Law: the layer is found below PEFT's model and without one."""
    batch, likelihood = padded("left"), AnswerTokens(TOKENS)
    plain = base("llama")
    expected = Likelihood.evaluate(likelihood, plain, batch)
    torch.testing.assert_close(likelihood.evaluate(plain, batch), expected, atol=1e-5, rtol=1e-5)
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"]))
    torch.testing.assert_close(likelihood.evaluate(adapted, batch), expected, atol=1e-5, rtol=1e-5)

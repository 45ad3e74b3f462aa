"""How much memory a fit and a prediction take, from the architecture alone: no weights, no data, no accelerator.

The program itself runs on torch's meta device, where tensors have shapes and types but no contents, and every
allocation is counted as it comes and goes. So it is the model's own layers, PEFT's own branches and the guide's own
draws that are counted, with activation checkpointing or without, and not a formula for them. In bytes:

    fit     = base + θ + 2 θ (Adam) + most of what is alive at once in a forward and backward pass
    predict = base + θ + most of what is alive at once under S draws of one batch (draws and logits among it)

base: every weight in its type; of linear maps in 4 bits ``n/2 + n/16`` (a float32 scale for 64 weights; with double
quantisation ``n/2 + n/64 + n/4096``), in 8 bits ``n + 4 outputs``, and while one is in use the widest again in the type
of the computation. θ: the guide's parameters, float32. Attention counts as a fused kernel, which keeps queries, keys,
values and its output, with keys and values repeated to the number of query heads.

Not counted: the accelerator's context (some 0.5 GiB), the allocator's rounding and fragmentation, workspaces inside
kernels, the attention mask (b T² bytes), what a guide does after its training (curvature, moments), a second process.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
)

from pyrolora.construct import RecipeError, classes
from pyrolora.guides.base import Guide
from pyrolora.inference.elbo import Objective
from pyrolora.inference.fit import CHECKPOINTING
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.predict import Runner, log_likelihood, log_probabilities
from pyrolora.likelihoods.answer_tokens import AnswerTokens
from pyrolora.likelihoods.base import Likelihood
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.likelihoods.next_token import NextToken
from pyrolora.likelihoods.normal import Normal
from pyrolora.program import Batch, PyroLoRA, evaluating
from pyrolora.recipe import Recipe

ATTENTION = "counted"  # the name under which transformers finds the attention below
LABELS, CHOICES = 2, 4  # of tasks that learn theirs from data; a head of a few outputs more or less weighs nothing
TEMPORARY = "gradients and temporary"


@dataclass(frozen=True)
class Estimate:
    """Memory in bytes, by part.

    Attributes:
        title: What was estimated.
        parameters: Numbers of parameters: of the base model, of plain LoRA, of the guide.
        fit: Part to bytes; empty where the guide has no training by gradients.
        predict: Part to bytes; empty where predictions need what the guide gathers in or after its training.
    """

    title: str
    parameters: Mapping[str, int]
    fit: Mapping[str, int] = field(default_factory=dict)
    predict: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.title, *(f"  {name:40s} {value:>18,}" for name, value in self.parameters.items())]
        for name, parts in (("fit", self.fit), ("predict", self.predict)):
            if parts:
                rows = {**parts, "in all": sum(parts.values())}
                lines += [f"{name}:", *(f"  {part:40s} {size / 2**30:14.3f} GiB" for part, size in rows.items())]
            else:
                lines.append(f"{name}: not computed; this guide does it in a stage of its own")
        return "\n".join(lines)


class Live(TorchDispatchMode):
    """Counts the bytes of tensors on the meta device that are alive, while it is entered.

    Args:
        known: Tensors that exist already and are not counted.

    Attributes:
        now: Bytes alive.
        peak: The most that were alive at once.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._alive = {id(storage): 0 for storage in (tensor.untyped_storage() for tensor in known)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._alive:
            self._alive[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, id(storage)).atexit = False

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def estimate(
    recipe: Recipe,
    guide: str,
    *,
    config: str | Path | None = None,
    batch_size: int | None = None,
    length: int | None = None,
    draws: int = 16,
    checkpointing: bool | None = None,
) -> Estimate:
    """The memory that a recipe takes under a guide.

    Args:
        recipe: The recipe.
        guide: Class name of the guide; the recipe's arguments for it apply.
        config: A model's config.json, or its folder; by default that of the recipe's base.
        batch_size: Rows at once; by default the recipe's in training, and 32 in prediction, as `Posterior.predict` has.
        length: Tokens of a row; by default the task's ``max_length``.
        draws: S, of a prediction; 8 of them run at once.
        checkpointing: Activation checkpointing; by default the recipe's ``gradient_checkpointing``.

    Raises:
        RecipeError: No configuration to be found, or a guide that does not fit.
    """
    arguments = recipe.arguments(None, seed=0)
    rows = batch_size or arguments.per_device_train_batch_size
    chosen = recipe.build_guide(guide)
    length = length or _task(recipe)[1].get("max_length", 0)
    program = meta_program(recipe, config)
    base = dict(program.model.get_base_model().named_parameters())
    own = {name: p for name, p in base.items() if p.device.type == "meta"}
    weights, widest = base_bytes(program.model, own, recipe.quantization)
    try:
        chosen.bind(program)
    except ValueError as error:
        raise RecipeError(f"{recipe.path}: {guide}: {error}") from error
    plain = sum(site.shape.numel() for site in program.sites.values())
    trained = sum(p.numel() for p in chosen.parameters())
    program.model.to("meta")
    # Counters and flags are looked at by the guides themselves, and keep their values.
    chosen._apply(lambda tensor: tensor if tensor.dim() == 0 else tensor.to("meta"))
    declared = any(getattr(arguments, name, False) for name in CHECKPOINTING)
    if declared if checkpointing is None else checkpointing:
        program.enable_activation_checkpointing()
    size = f"× {length} tokens" if length else "images"
    title = f"{recipe.path.name}, {guide}: {rows} {size} in training, {draws} draws in prediction"
    parameters = {"base model": sum(p.numel() for p in own.values()), "plain LoRA": plain, guide: trained}
    own_bytes = _bytes([*chosen.parameters(), *chosen.buffers()])
    fixed = {"base weights": weights, "guide's parameters and buffers": own_bytes}
    make = batches(program, recipe, length)
    # The members of an ensemble are trained one after another.
    part = next(iter(chosen.parts()), chosen)
    fit = {**fixed, **training(program, part, make(rows), widest)} if part.optimise else {}
    kind = type(part)
    later = kind.post_fit is not Guide.post_fit or kind.after_step is not Guide.after_step
    predict = {} if later else {**fixed, **prediction(program, chosen, make(batch_size or 32), draws, widest)}
    return Estimate(title, parameters, fit, predict)


def training(program: PyroLoRA, guide: Guide, batch: Batch, widest: int = 0) -> dict[str, int]:
    """What a step of training takes beside the weights and parameters, in bytes by part; all on the meta device."""
    objective = Objective(program, guide)
    objective._validated = True  # Pyro's checks look at values, of which there are none
    objective.train()
    parameters = list(guide.parameters())
    with Live([*program.parameters(), *program.buffers(), *guide.buffers(), *parameters, *batch.values()]) as live:
        with guide.hooks(program):
            loss = objective(batch)
        kept = live.now
        loss.backward()
        guide.zero_grad(set_to_none=True)
    return {
        "Adam's two moments": 2 * _bytes(parameters),
        "activations kept for the backward pass": kept,
        TEMPORARY: live.peak - kept + widest,
    }


@torch.no_grad()
def prediction(program: PyroLoRA, guide: Guide, batch: Batch, num_draws: int, widest: int = 0) -> dict[str, int]:
    """What a prediction of one batch takes beside the weights and parameters, in bytes by part; on the meta device."""
    language = isinstance(program.likelihood, NextToken)
    function = log_likelihood(program) if language else log_probabilities(program)
    random = guide.random_sites()
    known = [*program.parameters(), *program.buffers(), *guide.parameters(), *guide.buffers(), *batch.values()]
    guide.eval()
    with pyro.validation_enabled(False), Live(known) as live, evaluating(program.model):
        natural = guide.natural_parameters(program, num_draws)
        drawn = Posterior(program, guide).draw(guide.draws_for(num_draws)) if random and natural is None else {}
        draws = {name: value for name, value in drawn.items() if name in random}
        del drawn
        fixed = {name: value for name, value in guide.mean().items() if name not in draws}
        held = live.now
        Runner(program, draws, fixed, vectorise=True, natural=natural).evaluate(function, batch)
    return {"draws": held, "activations, logits and temporary": live.peak - held + widest}


def meta_program(recipe: Recipe, config: str | Path | None = None) -> PyroLoRA:
    """The recipe's program with its base on the meta device and its adapters, with random contents, on the CPU."""
    likelihood, auto_class, head = _kind(recipe)
    where = str(config or recipe.base_path())
    try:
        found = AutoConfig.from_pretrained(where, **head)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        hint = "give the model's config.json, --config PATH"
        raise RecipeError(f"{recipe.path}: no configuration in {where!r} ({hint}): {reason}") from error
    dtype = recipe.dtype or found.dtype or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    with torch.device("meta"):
        model = auto_class.from_config(found, dtype=dtype, attn_implementation=ATTENTION)
    adapter = recipe.build_adapter()
    if isinstance(adapter, str):
        adapter = LoraConfig.from_pretrained(adapter)
    try:
        adapted = get_peft_model(model, adapter)
        _materialise(adapted)
        return PyroLoRA(adapted, priors=recipe.build_priors(), likelihood=likelihood, num_data=1)
    except ValueError as error:
        raise RecipeError(f"{recipe.path}: {error}") from error


def base_bytes(model: nn.Module, weights: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the base's weights, and of its widest quantised map as it is in use (0 where none is quantised)."""
    plain = sum(w.numel() * w.element_size() for w in weights.values())
    bits = 4 if quantization.get("load_in_4bit") else 8 if quantization.get("load_in_8bit") else 0
    if not bits:
        return plain, 0
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    base = {name: module for name, module in linear.items() if module.weight.device.type == "meta"}
    last = next(reversed(base), "")  # bitsandbytes leaves the output layer as it is
    quantised = [module.weight for name, module in base.items() if name != last]
    saved = sum(w.numel() * w.element_size() - _packed(w, bits, quantization) for w in quantised)
    return plain - saved, max((w.numel() * w.element_size() for w in quantised), default=0)


def _packed(weight: Tensor, bits: int, quantization: Mapping[str, Any]) -> int:
    n = weight.numel()
    if bits == 8:
        return n + 4 * weight.shape[0]
    return n // 2 + (n // 64 + n // 4096 if quantization.get("bnb_4bit_use_double_quant") else n // 16)


def batches(program: PyroLoRA, recipe: Recipe, length: int) -> Callable[[int], dict[str, Tensor]]:
    """A function from a number of rows to a batch of that many on the meta device, as the recipe's task makes them."""
    name = _task(recipe)[0]
    like = program.likelihood
    config: Any = program.model.get_base_model().config

    def make(rows: int) -> dict[str, Tensor]:
        shape = (rows, CHOICES, length) if name == "CandidateChoice" else (rows, length)
        with torch.device("meta"):
            if name == "ImageClassification":
                pixels = torch.zeros(rows, config.num_channels, config.image_size, config.image_size)
                return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.int64)}
            ids = torch.zeros(shape, dtype=torch.int64)
            labels = ids.clone() if isinstance(like, NextToken) else torch.zeros(rows, dtype=torch.int64)
            if isinstance(like, Normal):
                labels = labels.float()
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    return make


def _task(recipe: Recipe) -> tuple[str, Mapping[str, Any]]:
    """Class name and arguments of the recipe's task, with the default of ``max_length``."""
    spec: Mapping[str, Any] = {"class_path": recipe.task} if isinstance(recipe.task, str) else recipe.task
    name, found = spec.get("class_path", ""), classes("tasks")
    if name not in found:
        raise RecipeError(f"{recipe.path}: task: unknown class {name!r}. There are {', '.join(found)}.")
    length = inspect.signature(found[name]).parameters.get("max_length")
    return name, {**({"max_length": length.default} if length else {}), **(spec.get("init_args") or {})}


def _kind(recipe: Recipe) -> tuple[Likelihood, Any, dict[str, Any]]:
    """The likelihood of the recipe's task, the class of model that it takes, and the options of its head."""
    name, options = _task(recipe)
    auto_class = classes("tasks")[name].auto_class  # type: ignore[attr-defined]
    if auto_class is AutoModelForCausalLM:
        return NextToken() if name == "LanguageModeling" else AnswerTokens(range(CHOICES)), auto_class, {}
    if name == "CandidateChoice":
        return Categorical(CHOICES), auto_class, {}
    if options.get("regression"):
        return Normal(), auto_class, {"num_labels": 1}
    labels = len(options.get("class_names") or range(LABELS))
    return Categorical(labels), auto_class, {"num_labels": labels}


def _materialise(model: nn.Module) -> None:
    """Gives what is trained contents, on the CPU: guides start from them."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None and value.requires_grad:
                module._parameters[name] = nn.Parameter(0.01 * torch.randn(value.shape, dtype=value.dtype))


class _Fused(torch.autograd.Function):
    """What a fused attention kernel allocates and keeps: its inputs, its output, a float32 for each query and head."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(query), query[..., 0].to(torch.float32, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """``(b, heads, T, size)`` to ``(b, T, heads, size)``, as transformers asks of an attention."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return _Fused.apply(query, key, value)[0].transpose(1, 2).contiguous(), None


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

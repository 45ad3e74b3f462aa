"""Frozen features of an input, from which a guide computes its local latent variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pyrolora.program import Batch, PyroLoRA, evaluating

Kind = Literal["embedding", "backbone"]
Features = Callable[[Batch], Tensor]


def frozen_features(program: PyroLoRA, kind: Kind) -> tuple[Features, int]:
    """A function from a batch to ``(b, width)`` features that no training changes, and their width.

    ``"embedding"``: the mean of the token embeddings over the real tokens (all choices of a multiple-choice example
    together), without a pass through the layers. A model without token embeddings gives the mean of its floating-point
    input, which must be as wide as the first adapted layer. ``"backbone"``: the mean of the base model's last hidden
    state, adapters and dropout off: one more forward pass for each batch.

    Args:
        program: The Pyro model.
        kind: Which.

    Raises:
        ValueError: ``"backbone"`` on a model that is not of Hugging Face's.
    """
    base: Any = program.model.get_base_model()
    # Not bound methods or partials: a guide is copied deeply, and must not take the base model along.
    if kind == "backbone":
        if not hasattr(base, "base_model_prefix"):
            raise ValueError("features='backbone' needs a transformers model; use features='embedding'")
        return (lambda batch: _last_hidden_state(program, base, batch)), base.config.get_text_config().hidden_size
    table = _embeddings(base)
    if table is None:
        width = next(iter(program.sites.values())).shape[-1]
        return (lambda batch: _mean_input(batch, width)), width
    return (lambda batch: _mean_embedding(table, batch)), table.weight.shape[-1]


def _embeddings(base: Any) -> nn.Embedding | None:
    table = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    table = table.get_base_layer() if isinstance(table, BaseTunerLayer) else table
    return table if isinstance(table, nn.Embedding) else None


@torch.no_grad()
def _mean_embedding(table: nn.Embedding, batch: Batch) -> Tensor:
    ids = batch["input_ids"]
    return _masked_mean(table(ids), batch.get("attention_mask", torch.ones_like(ids)), len(ids))


@torch.no_grad()
def _mean_input(batch: Batch, width: int) -> Tensor:
    for value in batch.values():
        if value.is_floating_point() and value.shape[-1] == width and value.dim() > 1:
            return value.reshape(len(value), -1, width).float().mean(1)
    raise ValueError(
        f"the batch has neither token ids nor a floating-point input of width {width}, the first adapted layer's: "
        "there are no features to compute the noise from"
    )


@torch.no_grad()
def _last_hidden_state(program: PyroLoRA, base: Any, batch: Batch) -> Tensor:
    size = len(next(iter(batch.values())))
    inputs = program.likelihood.forward_inputs(batch)
    # The choices of a multiple-choice example are rows of the backbone.
    inputs = {
        name: value.flatten(0, -2) if value.dim() > 2 and "ids" in name else value for name, value in inputs.items()
    }
    if "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"].reshape(-1, inputs["attention_mask"].shape[-1])
    body = base.get_encoder() if base.config.is_encoder_decoder else base.base_model
    # B at zero is the base model, also where the adapter was trained before.
    still = {n: torch.zeros(s.shape, device=program.device) for n, s in program.sites.items() if s.role == "B"}
    with evaluating(program.model), program.placed(still):
        hidden = body(**inputs)[0]
    mask = inputs.get("attention_mask", hidden.new_ones(hidden.shape[:2]))
    return _masked_mean(hidden, mask, size)


def _masked_mean(values: Tensor, mask: Tensor, size: int) -> Tensor:
    """Mean over all that belongs to an example, ``(b, ..., width)`` → ``(b, width)``, in float32."""
    flat = values.reshape(size, -1, values.shape[-1]).float()
    weight = mask.reshape(size, -1, 1).float()
    return (flat * weight).sum(1) / weight.sum(1).clamp(min=1)

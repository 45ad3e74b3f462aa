"""PEFT's own files, in and out, and the fingerprint of a base model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from pyrolora.adapters.placement import Placement
from pyrolora.adapters.sites import AdapterError

_SAMPLED_VALUES = 64


def load_adapter(base_model: nn.Module, folder: str | Path) -> PeftModel:
    """Injects an adapter that PEFT saved; its weights become the starting point of any guide.

    Args:
        base_model: The model on which the adapter was trained.
        folder: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        AdapterError: The folder holds no adapter, one kept in a pickle, one that is not LoRA, or one for another model.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{folder}: no adapter_config.json there; give a folder written by PEFT's save_pretrained")
    if not (folder / "adapter_model.safetensors").is_file():
        raise AdapterError(f"{folder}: no adapter_model.safetensors (pickled adapters are not opened)")
    config = PeftConfig.from_pretrained(str(folder))
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise AdapterError(f"{folder}: a {config.peft_type} adapter; only LORA can be sampled")
    try:
        return PeftModel.from_pretrained(base_model, str(folder), config=config)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise AdapterError(f"{folder}: the adapter does not fit this base model: {error}") from error


def export_adapter(model: PeftModel, placement: Placement, *, values: Mapping[str, Tensor], folder: str | Path) -> Path:
    """Writes one value of every site as an ordinary PEFT adapter that stock ``PeftModel.from_pretrained`` loads.

    Args:
        model: The PEFT model; unchanged afterwards.
        placement: Its placement.
        values: ``{site: (layers, *event_shape)}``.
        folder: Where to write ``adapter_config.json`` and ``adapter_model.safetensors``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), placement.placed(values):
        # Layers of one group share storage; safetensors wants each tensor to own its memory.
        adapter = {name: tensor.clone() for name, tensor in _adapter_state(model).items()}
        model.save_pretrained(str(folder), state_dict=adapter, safe_serialization=True)
    return folder


def _adapter_state(model: PeftModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if _is_adapter(name)}


def _is_adapter(name: str) -> bool:
    return "lora_" in name or ".modules_to_save." in name


def fingerprint(model: nn.Module) -> str:
    """A short hash of a base model's weights, blind to adapters, heads, device and float precision.

    Hashes the name, the shape and 64 evenly spaced values of every base parameter, rounded to bfloat16: loading the
    same checkpoint in another precision gives the same fingerprint, another checkpoint does not. One pass that reads
    64 numbers a tensor, so it takes about a second at 7B.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    rows = []
    for name, tensor in model.named_parameters():
        if _is_adapter(name) or ".original_module." in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        rows.append((plain, tensor))
    for name, tensor in sorted(rows, key=lambda row: row[0]):
        flat = tensor.detach().reshape(-1)
        where = torch.linspace(0, flat.numel() - 1, min(_SAMPLED_VALUES, flat.numel()), dtype=torch.float64).long()
        values = flat[where.to(flat.device)].cpu()
        rounded = values.to(torch.bfloat16).view(torch.int16) if values.is_floating_point() else values
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + rounded.numpy().tobytes())
    return digest.hexdigest()

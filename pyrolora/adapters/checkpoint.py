"""PEFT's own files, in and out, and the fingerprint of a base model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pyrolora.adapters.limits import check_patterns, limited
from pyrolora.adapters.placement import Placement
from pyrolora.adapters.sites import AdapterError

_SAMPLED_VALUES = 64


def load_adapter(base_model: nn.Module, folder: str | Path) -> PeftModel:
    """Injects an adapter that PEFT saved; its weights become the starting point of any guide.

    Args:
        base_model: The model on which the adapter was trained, without adapters. Load it afresh after an error.
        folder: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        AdapterError: The folder holds no adapter, one kept in a pickle, a damaged one, one that is not LoRA, one whose
            matrices are not those that the base model needs, or one that asks for more (see `limits`).
    """
    folder = Path(folder)
    if isinstance(base_model, PeftModel):
        raise AdapterError(
            f"{folder}: the base model has adapters already; give the model that they were injected into"
        )
    config, sizes = read_config(folder), _saved_sizes(folder)
    saved = set(sizes)
    try:
        check_patterns(config, base_model)
        with limited(sum(sizes.values())):
            model = PeftModel.from_pretrained(base_model, str(folder), config=config)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        # torch lists every mismatch; the first says enough.
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise AdapterError(f"{folder}: the adapter does not fit this base model: {first}") from error
    # PEFT leaves what it finds no place for unread, and what it does not find random.
    needed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    wrong = sorted((needed - saved) | {name for name in saved - needed if "lora_" in name})
    if wrong:
        where = "only the file" if wrong[0] in saved else "only the model"
        raise AdapterError(f"{folder}: the adapter does not fit this base model: {where} has {wrong[0]}")
    return model


def read_config(folder: str | Path) -> LoraConfig:
    """The `peft.LoraConfig` of a folder; nothing that it names is imported or loaded.

    Raises:
        AdapterError: No configuration, a damaged one, one that is not of LoRA, or one that asks PEFT to import code.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{folder}: no adapter_config.json there; give a folder written by PEFT's save_pretrained")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{folder / 'adapter_config.json'} cannot be read: {error!r}") from error
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise AdapterError(f"{folder}: an adapter of type {config.peft_type}; only LORA can be sampled")
    if config.megatron_config is not None:
        # PEFT imports the module that megatron_core names, in older releases whatever it is.
        raise AdapterError(f"{folder}: adapter_config.json asks for code of Megatron; only PEFT's own layers are used")
    return config


def _saved_sizes(folder: Path) -> dict[str, int]:
    """The names of the saved tensors, and how many numbers are in each."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise AdapterError(f"{folder}: no adapter_model.safetensors (pickled adapters are not opened)")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} is damaged or not a safetensors file: {error}") from error


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
    name = model.active_adapters[0]
    with torch.no_grad(), placement.placed(values):
        # Layers of one group share storage; safetensors wants each tensor to own its memory.
        state = {key: tensor.clone() for key, tensor in model.state_dict().items() if _is_adapter(key)}
        model.save_pretrained(str(folder), state_dict=state, selected_adapters=[name], save_embedding_layers=False)
    if name != "default":
        # PEFT puts an adapter of another name one folder deeper.
        for file in (folder / name).iterdir():
            file.replace(folder / file.name)
        (folder / name).rmdir()
    return folder


def _is_adapter(name: str) -> bool:
    return "lora_" in name or ".modules_to_save." in name


def fingerprint(model: nn.Module) -> str:
    """A short hash of a base model's weights, blind to adapters, to heads in ``modules_to_save``, and to the device.

    Hashes the name, the shape and 64 evenly spaced values of every base parameter, rounded to bfloat16: the same
    checkpoint loaded in float32 or bfloat16 has the same fingerprint, another checkpoint does not. (A float32
    checkpoint loaded in float16 is rounded twice and counts as another.) One pass that reads 64 numbers a tensor, so
    it takes about a second at 7B.

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

"""Site groups: PEFT's adapter parameters of one kind and shape, stacked over layers.

A 7B model has hundreds of adapter matrices. One Pyro site for each would cost hundreds of milliseconds a step in
Python, so the matrices that belong together form one site of shape ``(layers, *matrix)``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

_DIMS = {"A": ("rank", "in_feature"), "B": ("out_feature", "rank")}


class AdapterError(ValueError):
    """An adapter that cannot become a sample site; the message names the module and says what to change."""


@dataclass(frozen=True)
class SiteGroup:
    """Adapter parameters of one kind and shape, stacked over layers: one Pyro sample site.

    Shape: ``(layers, *event_shape)``, where ``event_shape`` is that of one parameter as PEFT stores it:
    ``(rank, in_features)`` for ``lora_A``, ``(out_features, rank)`` for ``lora_B``. PEFT keeps the adapters of E
    experts in one such pair with E·r ranks: rank k of expert e is row ``e·r + k`` of A, and column ``k·E + e`` of B.

    Attributes:
        name: The Pyro site, for instance ``lora.q_proj.A`` or ``head.classifier.weight``.
        role: ``"A"``, ``"B"`` or ``"head"``.
        holders: For each layer the module that holds the parameter, and the parameter's name there.
        layers: For each layer the name of the adapted module in the base model.
        shape: ``(layers, *event_shape)``.
        dims: Names of the dimensions; the first is ``layer``, or ``head`` (of size 1) for a head.
        scaling: PEFT's ``lora_alpha / r`` (or rsLoRA's) for each layer; ones for a head.
        dtype: The type in which PEFT keeps the parameter.
    """

    name: str
    role: str
    holders: tuple[tuple[str, str], ...]
    layers: tuple[str, ...]
    shape: torch.Size
    dims: tuple[str, ...]
    scaling: tuple[float, ...]
    dtype: torch.dtype

    @property
    def num_layers(self) -> int:
        return self.shape[0]

    @property
    def event_shape(self) -> torch.Size:
        return self.shape[1:]

    @property
    def event_dim(self) -> int:
        return len(self.shape) - 1

    @property
    def fan_in(self) -> int:
        """Number of inputs that one output of this parameter sums over: its last dimension.

        1 for a bias, and for the A of an embedding, of which each token reads a single column.
        """
        embedding = self.role == "A" and self.holders[0][0].endswith(".lora_embedding_A")
        return 1 if embedding or self.event_dim == 1 else self.shape[-1]

    @property
    def plate(self) -> str:
        """Name of the plate over layers, shared by the A and the B of one kind."""
        return f"{self.name.rsplit('.', 1)[0]}.layers" if self.role != "head" else f"{self.name}.layers"


@dataclass(frozen=True)
class _Parameter:
    """One adapter parameter as found in the model, before stacking."""

    kind: str
    role: str
    layer: str
    holder: tuple[str, str]
    value: Tensor
    scaling: float
    partner: torch.Size


def find_sites(model: PeftModel, *, adapter: str = "default") -> dict[str, SiteGroup]:
    """Groups all adapter parameters of a PEFT model into sites.

    Layers are of one group when the last part of their name (``q_proj``) and the shapes of both A and B agree. A
    second shape under the same name becomes ``lora.q_proj.1.A``, and so on. Every parameter under
    ``modules_to_save`` is a group of one layer, ``head.<name>``.

    Args:
        model: A model into which PEFT has injected LoRA.
        adapter: PEFT's name of the adapter.

    Returns:
        Site name to group, in the order of the model's modules, A before B.

    Raises:
        AdapterError: A module that cannot be served (DoRA, LoRA bias, convolution, tied adapters, ...), or no LoRA.
    """
    _check_config(model, adapter)
    groups: dict[tuple, list[_Parameter]] = {}
    for parameter in _untied(_parameters(model, adapter)):
        shape = parameter.value.shape
        groups.setdefault((parameter.kind, parameter.role, shape, parameter.partner), []).append(parameter)
    if not groups:
        raise AdapterError(f"adapter {adapter!r} has no LoRA parameters on this model; were its layers unloaded?")
    return _named(groups)


def _named(groups: Mapping[tuple, list[_Parameter]]) -> dict[str, SiteGroup]:
    sites: dict[str, SiteGroup] = {}
    for (kind, role, _, _), found in groups.items():
        name = _free_name(kind, role, sites)
        event = found[0].value.shape
        sites[name] = SiteGroup(
            name=name,
            role=role,
            holders=tuple(p.holder for p in found),
            layers=tuple(p.layer for p in found),
            shape=torch.Size((len(found), *event)),
            dims=_dims(role, len(event)),
            scaling=tuple(p.scaling for p in found),
            dtype=found[0].value.dtype,
        )
    return sites


def _dims(role: str, event_dim: int) -> tuple[str, ...]:
    if role != "head":
        return ("layer", *_DIMS[role])
    known = {1: ("feature",), 2: ("out_feature", "in_feature")}
    return ("head", *known.get(event_dim, tuple(f"dim_{i}" for i in range(event_dim))))


def _free_name(kind: str, role: str, taken: Mapping[str, SiteGroup]) -> str:
    if role == "head":
        return f"head.{kind}"
    candidates = (f"lora.{kind}{'' if i == 0 else f'.{i}'}.{role}" for i in range(len(taken) + 1))
    return next(name for name in candidates if name not in taken)


def _check_config(model: PeftModel, adapter: str) -> None:
    if adapter not in model.peft_config:
        raise AdapterError(f"the model has no adapter {adapter!r}; it has {', '.join(model.peft_config)}")
    config = model.peft_config[adapter]
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        kind = type(config).__name__
        raise AdapterError(f"adapter {adapter!r} is declared by a {kind}; only LoRA can be sampled: give a LoraConfig")
    if config.bias != "none":
        raise AdapterError(
            f"{_first_bias(model)}: LoraConfig(bias={config.bias!r}) trains biases of the base model, which have no "
            'site. Set bias="none".'
        )


def _first_bias(model: PeftModel) -> str:
    names = (name for name, _ in model.named_parameters() if name.endswith(".bias"))
    return _base_name(next(names, "biases").replace(".base_layer", ""))


def _untied(parameters: Iterator[_Parameter]) -> Iterator[_Parameter]:
    seen: dict[int, str] = {}
    for parameter in parameters:
        address = parameter.value.data_ptr()
        if address in seen and parameter.value.device.type != "meta":
            raise AdapterError(
                f"{parameter.layer}: its adapter is tied to that of {seen[address]}; one tensor cannot be two sites. "
                "Set ensure_weight_tying=False, or adapt only one of the two."
            )
        seen[address] = parameter.layer
        yield parameter


def _parameters(model: PeftModel, adapter: str) -> Iterator[_Parameter]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            _check_served(path, module, adapter)
            yield from _lora_parameters(path, module, adapter)
        elif isinstance(module, ModulesToSaveWrapper):
            yield from _head_parameters(path, module, adapter)
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not isinstance(module, LoraLayer):
            raise AdapterError(
                f"{path}: {type(module).__name__} is not LoRA. Use a plain peft.LoraConfig "
                "(no trainable_token_indices) with heads in modules_to_save."
            )


def _lora_parameters(path: str, module: LoraLayer, adapter: str) -> Iterator[_Parameter]:
    if adapter in module.lora_embedding_A:
        holders = [(f"{path}.lora_embedding_A", adapter), (f"{path}.lora_embedding_B", adapter)]
        a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    else:
        holders = [(f"{path}.lora_A.{adapter}", "weight"), (f"{path}.lora_B.{adapter}", "weight")]
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    # PEFT nests one ParamWrapper in another (".base_layer") where several expert parameters are adapted.
    layer = _base_name(path).replace(".base_layer", "")
    kind = layer.rsplit(".", 1)[-1]
    if isinstance(module, ParamWrapper):
        kind = f"{kind}.{module.parameter_name}"
    scaling = float(module.scaling[adapter])
    yield _Parameter(kind, "A", layer, holders[0], a, scaling, b.shape)
    yield _Parameter(kind, "B", layer, holders[1], b, scaling, a.shape)


def _base_name(path: str) -> str:
    return re.sub(r"^base_model\.model\.", "", path)


def _check_served(path: str, module: LoraLayer, adapter: str) -> None:
    if adapter in module.lora_variant or adapter in module.lora_magnitude_vector:
        raise AdapterError(f"{path}: only plain LoRA can be sampled, not a variant (DoRA, aLoRA, ...). Turn it off.")
    if module.lora_bias.get(adapter, False):
        raise AdapterError(f"{path}: lora_bias=True adds a bias to lora_B that has no site. Set lora_bias=False.")
    if module.merged:
        raise AdapterError(f"{path}: the adapter is merged into the base weight. Call unmerge_adapter() first.")
    matrices = [module.lora_A[adapter], module.lora_B[adapter]] if adapter in module.lora_A else []
    if any(not isinstance(matrix, nn.Linear) for matrix in matrices) or isinstance(module, MultiheadAttention):
        raise AdapterError(
            f"{path}: LoRA on {type(module.get_base_layer()).__name__} cannot be sampled (linear, Conv1D, embedding "
            "and 3-D expert parameters can). Leave it out of target_modules."
        )


def _head_parameters(path: str, module: ModulesToSaveWrapper, adapter: str) -> Iterator[_Parameter]:
    if adapter not in module.modules_to_save:
        return
    layer = _base_name(path)
    root = f"{path}.modules_to_save.{adapter}"
    for name, value in module.modules_to_save[adapter].named_parameters():
        inner, _, parameter = name.rpartition(".")
        holder = (f"{root}.{inner}" if inner else root, parameter)
        yield _Parameter(f"{layer}.{name}", "head", layer, holder, value, 1.0, torch.Size())

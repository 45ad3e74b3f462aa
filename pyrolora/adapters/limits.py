"""What a file may ask for: no more numbers than it accounts for, and no pattern that takes for ever."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from torch.overrides import TorchFunctionMode

from pyrolora.adapters.sites import AdapterError

_FREE = 10**8  # numbers that any machine bears, half a gigabyte of them
_WAYS, _WAYS_OF_ALL, _NEVER = 10**5, 10**9, 10**30  # through one name, and through all, that take seconds
_FACTORIES = frozenset(["empty", "zeros", "ones", "full", "rand", "randn", "eye", "arange", "linspace"])
_SPELLINGS = ("{}", "new_{}", "{}_like")
_NAMES = frozenset(spelling.format(name) for name in _FACTORIES for spelling in _SPELLINGS)
_PLAIN = re.compile(r"(\.\*)?[\w.\-]*")
_TOKEN = re.compile(
    r"(?P<group>\((?!\?)|\(\?:|\(\?P<\w+>)|(?P<special>\(\?|\\\d)|(?P<end>\))|(?P<bar>\|)"
    r"|(?P<perhaps>\?[?+]?)|(?P<repeat>(?:[*+]|\{\d*,?\d*\})[?+]?)|(?P<atom>\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.)",
    re.DOTALL,
)


@contextlib.contextmanager
def limited(numbers: int) -> Iterator[None]:
    """A block in which torch makes no more new numbers than some multiple of those given; to build what a file says.

    Args:
        numbers: Those that the file accounts for. A hundred million are free.

    Raises:
        AdapterError: More were asked for; none of them has been made.
    """
    with _Limit(_FREE + 16 * numbers):
        yield


class _Limit(TorchFunctionMode):
    def __init__(self, numbers: int):
        super().__init__()
        self.left = numbers

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if getattr(func, "__name__", "") in _NAMES:
            # On the device "meta" there are shapes and no numbers. Each call counts for something: there may be many.
            shape_alone = {name: value for name, value in options.items() if name not in ("generator", "out")}
            asked = func(*args, **{**shape_alone, "device": "meta", "pin_memory": False}).numel()
            self.left -= max(asked, 10_000)
            if self.left < 0:
                raise AdapterError(
                    f"it asks for {asked:,} numbers and more, for which the tensors in it do not account"
                )
        return func(*args, **options)


def check_patterns(config: LoraConfig, model: nn.Module) -> None:
    """Refuses patterns that PEFT would not be done with matching: it takes names of modules for regular expressions.

    Plain names pass, and so do expressions in which a repetition is of a single character or of a plain group
    (``.*\\.layers\\.\\d+\\..*(q|v)_proj``) and which can go through the model's names in few enough ways.

    Args:
        config: As a file gave it.
        model: The base model whose modules are matched.

    Raises:
        AdapterError: A repetition within a repetition, look-around or back-references, or too many ways.
    """
    names = [name for name, _ in model.named_modules()]
    longest = max(map(len, names))
    for field, patterns in _patterns(config).items():
        if len(patterns) > len(names):
            raise AdapterError(f"{field} has {len(patterns)} entries, the base model has {len(names)} modules")
        wild = [pattern for pattern in patterns if not _PLAIN.fullmatch(pattern)]
        if sum(_ways(pattern, longest) for pattern in wild) > max(_WAYS, _WAYS_OF_ALL // len(names)):
            raise AdapterError(
                f"{field}: matching {', '.join(wild)[:80]!r} may take for ever; name the modules, or repeat single "
                "characters and plain groups only"
            )


def readable(config: LoraConfig, model: PeftModel, adapter: str) -> LoraConfig:
    """The configuration to save: where `check_patterns` would refuse it, with names of modules for its patterns."""
    base = model.get_base_model()
    with contextlib.suppress(AdapterError):
        check_patterns(config, base)
        return config
    tuner: Any = model.base_model
    layers: dict[str, Any] = {name: base.get_submodule(name) for name in sorted(tuner.targeted_module_names)}
    named = copy.copy(config)
    named.target_modules, named.exclude_modules = [*layers], None
    named.layers_to_transform, named.layers_pattern = None, None
    named.rank_pattern = {name: layer.r[adapter] for name, layer in layers.items()}
    named.alpha_pattern = {name: layer.lora_alpha[adapter] for name, layer in layers.items()}
    return named


def _patterns(config: LoraConfig) -> dict[str, list[str]]:
    """The fields that PEFT matches as regular expressions. Lists of target_modules are compared, not matched."""
    fields = {name: getattr(config, name) for name in ("target_modules", "exclude_modules")}
    found = {name: [value] for name, value in fields.items() if isinstance(value, str) and value != "all-linear"}
    layers = config.layers_pattern
    found["layers_pattern"] = [layers] if isinstance(layers, str) else [*(layers or [])]
    found |= {name: [*(getattr(config, name) or {})] for name in ("rank_pattern", "alpha_pattern", "modules_to_save")}
    # Before those of more than one PEFT puts a repetition of its own.
    return {n: [str(p) if n in fields else f".*{p}" for p in patterns] for n, patterns in found.items()}


def _ways(pattern: str, length: int) -> int:
    """At most how many ways a matcher that backtracks can go through a text; endless where they may be exponential.

    Each of q repetitions can end anywhere, ``C(length + q, q)``; each alternative and each ``?`` is a fork.
    """
    forks, repeats = 1, 0
    open_groups: list[list[int]] = [[1, True]]  # alternatives, and whether a repetition of the group would be harmless
    plain = False  # whether what stands before may be repeated
    for token in _TOKEN.finditer(pattern):
        kind, group = token.lastgroup, open_groups[-1]
        if kind == "special":
            return _NEVER
        if kind == "group":
            open_groups.append([1, True])
        elif kind == "end":
            if len(open_groups) == 1:
                return _NEVER
            alternatives, inside = open_groups.pop()
            forks *= alternatives
            plain = bool(inside) and alternatives == 1
            open_groups[-1][1] &= plain
        elif kind == "bar":
            group[0] += 1
        elif kind == "atom":
            plain = True
        else:
            if kind == "repeat" and not plain:
                return _NEVER
            group[1], plain = False, False
            forks, repeats = (2 * forks, repeats) if kind == "perhaps" else (forks, repeats + 1)
    return forks * open_groups[0][0] * math.comb(length + repeats, repeats)

"""What a file may ask for: no more numbers than it accounts for, and no pattern that takes for ever."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from peft import LoraConfig
from torch import nn
from torch.overrides import TorchFunctionMode

from pyrolora.adapters.sites import AdapterError

_FREE = 10**8  # numbers that any machine bears, half a gigabyte of them
_PATIENCE = 10.0  # seconds for all patterns of a file on all names of modules, which takes milliseconds
_FACTORIES = frozenset(["empty", "zeros", "ones", "full", "rand", "randn", "eye", "arange", "linspace"])
_SPELLINGS = ("{}", "new_{}", "{}_like")
_NAMES = frozenset(spelling.format(name) for name in _FACTORIES for spelling in _SPELLINGS)
_PLAIN = re.compile(r"[\w.\-]*")
# What PEFT does with a pattern and a name (`target_modules`; ranks and scalings by name; `layers_pattern`). One that is
# no regular expression is PEFT's to refuse.
_MATCH = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for form in ("{}\\Z", r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."):
        try:
            compiled = re.compile(form.format(pattern))
        except (re.error, OverflowError, RecursionError):
            continue
        for name in names:
            compiled.match(name)
"""


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

    Whether one is slow nobody can tell by looking at it: another process tries it on the names, and is stopped.

    Args:
        config: As a file gave it.
        model: The base model whose modules are matched.

    Raises:
        AdapterError: Patterns that take longer than ten seconds, on which the matcher fails, or more of them than there
            are modules.
    """
    names = [name for name, _ in model.named_modules()]
    for field, patterns in _patterns(config).items():
        if len(patterns) > len(names):
            raise AdapterError(f"{field} has {len(patterns)} entries, the base model has {len(names)} modules")
        wild = [pattern for pattern in patterns if not _PLAIN.fullmatch(pattern)]
        if not wild:
            continue
        try:
            command, given = [sys.executable, "-I", "-S", "-c", _MATCH], json.dumps([wild, names]).encode()
            subprocess.run(command, input=given, stderr=subprocess.DEVNULL, timeout=_PATIENCE, check=True)
        except subprocess.SubprocessError as error:
            what = f"takes longer than {_PATIENCE:g} s" if isinstance(error, subprocess.TimeoutExpired) else "fails"
            raise AdapterError(f"{field}: matching {', '.join(wild)[:80]!r} {what}; name the modules") from None


def _patterns(config: LoraConfig) -> dict[str, list[str]]:
    """The fields that PEFT matches as regular expressions. Lists of target_modules are compared, not matched."""
    fields = {name: getattr(config, name) for name in ("target_modules", "exclude_modules")}
    found = {name: [value] for name, value in fields.items() if isinstance(value, str) and value != "all-linear"}
    layers = config.layers_pattern
    found["layers_pattern"] = [layers] if isinstance(layers, str) else [*(layers or [])]
    found |= {name: [*(getattr(config, name) or {})] for name in ("rank_pattern", "alpha_pattern", "modules_to_save")}
    return {name: [str(pattern) for pattern in patterns] for name, patterns in found.items()}

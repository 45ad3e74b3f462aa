"""What a file may ask for: numbers are counted before they are made, patterns before they are matched."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from pyrolora.adapters import limits
from pyrolora.adapters.checkpoint import load_adapter
from pyrolora.adapters.limits import check_patterns, limited
from pyrolora.adapters.sites import AdapterError
from tests.programs import lora, tiny_bert


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """What hangs is stopped, which the engine of regular expressions allows."""

    def stop(*arguments: object) -> None:
        raise TimeoutError(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


FINE = [
    r".*\.(query|value)",
    r".*\.layer\.\d+\..*(query|value|dense)$",
    r"bert\.encoder\.layer\.(0|1)\.attention\.self\.[qv]\w+",
    r"(?:.*\.)?query",
    r".*(self_)?attention\..*query",
    r"(?P<root>bert)\.encoder.*[^.]+\.query",
    r".*layer\.\d{1,2}\.[a-z.]*?(query)",
    r"(ab)*.*query",
]
# No name of the model ends in x.
ENDLESS = [
    r"(.*)*(.*)*(.*)*x",
    r"([a-z.]+)*x",
    r"(\w|\w\w|\.)*x",
    r"(.?){99}x",
    r".*.*.*.*.*.*.*.*.*.*x",
    "(?:.|.)" * 26 + "x",
    r"(\w+\.?)*x",
]
NEVER_COMPILED = ["*" * 10, "a)(b", "(" * 1000 + ")" * 1000]


@pytest.mark.parametrize("pattern", FINE)
def test_patterns_that_one_writes_pass(pattern: str) -> None:
    """Law: patterns as they stand in PEFT's documentation and in recipes are let through, and match at once."""
    check_patterns(lora(target_modules=pattern), tiny_bert())
    with within(10):
        assert get_peft_model(tiny_bert(), lora(target_modules=pattern))


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern"])
def test_patterns_that_take_for_ever_are_refused(pattern: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a pattern whose match does not end in time is refused by its field, wherever PEFT would match it."""
    monkeypatch.setattr(limits, "_PATIENCE", 0.5)
    value = {"layers_pattern": [pattern], "rank_pattern": {pattern: 3}}.get(field, pattern)
    config = lora()
    setattr(config, field, value)
    with within(10), pytest.raises(AdapterError, match=rf"{field}: matching .* takes longer than 0.5 s; name the"):
        check_patterns(config, tiny_bert())


@pytest.mark.parametrize("pattern", NEVER_COMPILED, ids=lambda pattern: pattern[:8])
def test_what_is_no_pattern_is_left_to_peft(pattern: str) -> None:
    """Law: text that is no regular expression takes no time; PEFT says what is wrong with it."""
    check_patterns(lora(target_modules=pattern), tiny_bert())


def test_a_matcher_that_fails_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a pattern that ends the matcher itself, out of memory or otherwise, is refused by its field."""
    monkeypatch.setattr(limits, "_MATCH", "raise MemoryError")
    with pytest.raises(AdapterError, match=r"target_modules: matching '\.\*query' fails; name the modules"):
        check_patterns(lora(target_modules=r".*query"), tiny_bert())


def test_more_patterns_than_modules_are_refused() -> None:
    """Law: ranks by name are for modules that there are; a million names are refused before any is compiled."""
    config = lora(rank_pattern={f"layer{i}": 2 for i in range(10**5)})
    with within(10), pytest.raises(AdapterError, match=r"rank_pattern has 100000 entries, the base model has \d+ mod"):
        check_patterns(config, tiny_bert())


def test_numbers_are_counted_before_they_are_made() -> None:
    """Law: within a limit, what the file accounts for and a hundred million are free; more stops before it is made."""
    with limited(0):
        assert torch.zeros(10**6).shape == (10**6,)
        assert nn.Linear(10, 10)(torch.ones(2, 10)).shape == (2, 10)
        torch.rand(3, generator=torch.Generator())
    for make in (
        lambda: torch.zeros(10**6, 10**6),
        lambda: torch.empty((10**12,)),
        lambda: nn.Linear(10**6, 10**6),
        lambda: torch.ones(2).new_zeros((10**12,)),
        lambda: torch.eye(10**6),
        lambda: torch.full((10**7, 10**5), 1.0),
        lambda: torch.arange(10**12),
    ):
        with limited(0), pytest.raises(AdapterError, match="numbers and more, for which the tensors in it do not"):
            make()
    with limited(10**8):
        torch.empty(10**9)  # never touched, so not in memory


def test_endless_loops_end() -> None:
    """Law: many small tensors count too."""
    with within(60), limited(0), pytest.raises(AdapterError, match="numbers and more"):
        while True:
            torch.zeros(1)


def save(folder: Path, **changes: object) -> None:
    """An adapter as PEFT saves it, with another configuration."""
    get_peft_model(tiny_bert(), lora()).save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**9},
        {"r": 10**7},
        {"rank_pattern": {"query": 10**8}},
        {"target_modules": "(.*)*(.*)*(.*)*x"},
        {"rank_pattern": {"([a-z.]*)*#": 1}},
    ],
    ids=str,
)
def test_hostile_adapters_of_peft(tmp_path: Path, changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a foreign adapter that asks for more than is in it, or for endless matching, is refused at once."""
    monkeypatch.setattr(limits, "_PATIENCE", 0.5)
    save(tmp_path, **changes)
    with (
        within(20),
        pytest.raises(AdapterError, match=r"does not fit this base model: .*(do not account|takes longer)"),
    ):
        load_adapter(tiny_bert(), tmp_path)


@pytest.mark.parametrize("modules", ["all-linear", r".*\.(query|value)", ["query", "value"]], ids=str)
def test_adapters_that_peft_writes_are_read(tmp_path: Path, modules: str | list[str]) -> None:
    """Law: lists, regular expressions and all-linear load from the file that PEFT itself saves."""
    stock = get_peft_model(tiny_bert(), lora(target_modules=modules))
    stock.save_pretrained(str(tmp_path))
    loaded = load_adapter(tiny_bert(), tmp_path)
    assert loaded.state_dict().keys() == stock.state_dict().keys()

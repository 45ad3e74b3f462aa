"""The README's code runs as printed, on less data."""

from __future__ import annotations

import functools
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import pyrolora.tasks
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.generate import generate
from pyrolora.priors.base import checked
from tests.programs import MINILM, language_posterior, tiny_llama, tiny_program

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_the_first_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Law: what a newcomer copies works, from recipe to exported adapter."""
    small = functools.partial(pyrolora.tasks.PhysicalCommonsense, num_train=16, num_validation=8, num_test=8, num_ood=0)
    monkeypatch.setattr(pyrolora.tasks, "PhysicalCommonsense", small)
    fit_module = import_module("pyrolora.inference.fit")
    arguments = fit_module.default_arguments()
    arguments.max_steps = 2
    monkeypatch.setattr(fit_module, "default_arguments", lambda: arguments)
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "mutual_information" in printed
    assert "mean field" in printed
    assert (tmp_path / "runs" / "mean" / "adapter_model.safetensors").is_file()


def test_the_readmes_own_prior_works() -> None:
    """Law: the README's prior is a prior: it samples its scale and fits every site."""
    names: dict = {}
    exec(compile(BLOCKS[1], "README.md", "exec"), names)
    program = tiny_program({"*": names["shared_scale"]})
    assert "lora.query.A.scale" in program.latents
    fn = checked(names["shared_scale"], program.sites["lora.query.A"])
    assert torch.isfinite(fn.log_prob(fn.sample())).all()


def test_stock_peft_serves_mean_and_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Law: exported mean and draws, loaded side by side as the README does, write the posterior's own greedy texts."""
    posterior = language_posterior(MeanField(random="*"))
    tiny_llama().save_pretrained(tmp_path / "base")
    # A BERT tokenizer would give token types too, and end the prompt with [SEP]; those of causal models do neither.
    AutoTokenizer.from_pretrained(MINILM, model_input_names=["input_ids", "attention_mask"]).save_pretrained(
        str(tmp_path / "base")
    )
    posterior.export_peft(tmp_path / "adapters" / "mean")
    for s in range(2):
        posterior.export_peft(tmp_path / "adapters" / f"draw-{s}", draw=s)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    block = next(block for block in BLOCKS if "load_adapter" in block)
    block = block.replace('("The cold stone"', '("[CLS] The cold stone", add_special_tokens=False')
    exec(compile(block.replace("do_sample", "pad_token_id=0, do_sample"), "README.md", "exec"), names)
    options: dict = {"max_new_tokens": 8, "temperature": 0}
    mean = generate(posterior, "The cold stone", num_draws=0, **options).texts[0]
    draws = generate(posterior, "The cold stone", num_draws=2, how="draws", **options).texts[0]
    expected = {"mean": mean[0], "draw-0": draws[0], "draw-1": draws[1]}
    assert names["answers"] == {name: "the cold stone" + text.text for name, text in expected.items()}
    assert len(set(names["answers"].values())) > 1


@pytest.mark.parametrize("name", ["README.md", "tests/benchmarks/README.md"])
def test_its_links_lead_somewhere(name: str) -> None:
    """Law: every picture and file exists that a page refers to, and every heading."""
    page = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if not link.startswith("https://")]
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def headings(page: Path) -> set[str]:
    """Anchors of a page: words of its headings in lower case, hyphens for spaces, no punctuation."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from pyrolora.cli import main
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.generate import generate
from pyrolora.recipe import Recipe
from pyrolora.report.terminal import marked
from pyrolora.saved import load, save
from tests.programs import chat_tokenizer, language_posterior, tiny_llama, tokenizer
from tests.recipes import write_recipe, write_rows
from tests.terminal import Captured, fails

DRAWS = ["--draws", "3", "--max-new-tokens", "6", "--levels", "0.02", "0.1"]


def saved(folder: Path, words: PreTrainedTokenizerBase) -> Path:
    """A saved posterior over a tiny Llama, with its recipe."""
    tiny_llama(words).save_pretrained(folder / "base")
    words.save_pretrained(str(folder / "base"))
    write_rows(folder / "train.jsonl", [{"text": "the cold stone lies in a warm house while dark water runs"}])
    recipe = write_recipe(
        folder,
        adapter={"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
        task={"class_path": "LanguageModeling", "init_args": {"train": "train.jsonl", "max_length": 8}},
    )
    posterior = language_posterior(MeanField(random="*"), tiny_llama(words), words)
    return save(posterior, Recipe.read(recipe), folder / "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer that has no chat template. Read only."""
    return saved(tmp_path_factory.mktemp("language"), tokenizer())


def test_piped(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: prompts, then lines of the file, each with its text in one plain line whose marks are the API's."""
    (tmp_path / "prompts.txt").write_text("in a warm house\n\n", encoding="utf-8")
    capsys.readouterr()
    said = ["--prompt", "the cold stone", "--prompt", "water"]
    main(["generate", str(folder), *said, "--file", str(tmp_path / "prompts.txt"), *DRAWS])
    printed = capsys.readouterr().out
    prompts = ["the cold stone", "water", "in a warm house"]
    found = generate(load(folder)[0], prompts, num_draws=3, max_new_tokens=6)
    expected = [p + marked(t[0], (0.02, 0.1), colour=False) for p, t in zip(prompts, found, strict=True)]
    assert printed == "".join(f"{line}\n" for line in expected)
    assert "[?]" in printed and "\x1b" not in printed


def test_in_a_terminal(folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a terminal gets colours and a legend, and marks in their place where it asks for none."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for colour in (True, False):
        if not colour:
            monkeypatch.setenv("NO_COLOR", "1")
        capsys.readouterr()
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        main(["generate", str(folder), "--prompt", "water", *DRAWS])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("water") and lines[-1].startswith("doubted words")
        assert ("\x1b[30;4" in lines[0]) == ("\x1b[30;43m" in lines[-1]) == colour
        assert ("[?" in lines[0]) == (not colour)


def test_draws_and_json(folder: Path, capsys: Captured) -> None:
    """Law: a text of each draw and how far they differ, on screen and in JSON; JSON is the API's."""
    capsys.readouterr()
    command = ["generate", str(folder), "--prompt", "water", "--how", "draws", "--seed", "1", *DRAWS]
    main(command)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("water") for line in lines[:3])
    main([*command, "--format", "json"])
    plain = json.loads(capsys.readouterr().out)
    found = generate(load(folder)[0], "water", num_draws=3, max_new_tokens=6, how="draws", seed=1)
    assert plain == json.loads(json.dumps(found.to_dict()))
    assert found.disagreement is not None
    assert lines[3].startswith(f"  {found.disagreement[0].differing:.0%} of pairs differ")


def test_chat(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: --chat puts prompts into the chat template, as the API does, and shows each reply below its prompt; a
    tokenizer without a template is one line."""
    own = saved(tmp_path, chat_tokenizer())
    capsys.readouterr()
    command = ["generate", str(own), "--prompt", "the cold stone", *DRAWS]
    main([*command, "--chat"])
    lines = capsys.readouterr().out.splitlines()
    found, plain = (
        generate(load(own)[0], "the cold stone", num_draws=3, max_new_tokens=6, chat=c) for c in (True, False)
    )
    assert lines == ["the cold stone", marked(found.texts[0][0], (0.02, 0.1), colour=False)]
    main([*command, "--chat", "--format", "json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.to_dict()))
    assert found.texts[0][0].tokens.tolist() != plain.texts[0][0].tokens.tolist()
    assert "has no chat template" in fails(capsys, "generate", folder, "--prompt", "water", "--chat")


def test_wrong_prompts(folder: Path, fitted: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: no prompt, a missing file, levels out of order and a classifier's posterior are one line each."""
    assert "nothing to continue: give --prompt" in fails(capsys, "generate", folder)
    assert "none.txt does not exist" in fails(capsys, "generate", folder, "--file", tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt is not UTF-8 text" in fails(capsys, "generate", folder, "--file", tmp_path / "latin.txt")
    said = fails(capsys, "generate", folder, "--prompt", "a", "--levels", "0.3", "0.1")
    assert "--levels are two numbers above 0, the lower one first, not 0.3 0.1" in said
    assert "generates no text" in fails(capsys, "generate", fitted, "--prompt", "a")

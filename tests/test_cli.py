from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file

from pyrolora.cli import COMMANDS, build_parser, main
from pyrolora.diagnostics.evaluation import evaluate_posterior, fit_scaling
from pyrolora.inference.posterior import Posterior
from pyrolora.recipe import Recipe
from tests.recipes import write_recipe, write_rows

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def fitted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `pyrolora fit` wrote. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "mf"
    main(["fit", str(recipe), "--guide", "MeanField", "--output", str(folder), "--seed", "3"])
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """New rows, without labels."""
    texts = ["a warm house", "the dark cold river", "stone"]
    return write_rows(tmp_path_factory.mktemp("new") / "new.jsonl", [{"text": text} for text in texts])


def fails(capsys: Captured, *arguments: str | Path, code: int = 1) -> str:
    """The one line on stderr with which a command stops."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == code
    said = [line for line in re.split(r"[\r\n]+", err) if line and "tokenising" not in line and "Loading" not in line]
    assert len(said) == 1 and said[0].startswith("pyrolora: "), err
    assert "Traceback" not in out + err
    return said[0]


def helps(capsys: Captured, *command: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


# -- what a user does first ------------------------------------------------------------------------------------------


def test_sites(recipe: Path, capsys: Captured) -> None:
    """Law: the table of sites has every site of the program with its prior."""
    main(["sites", str(recipe)])
    out = capsys.readouterr().out
    program = Recipe.read(recipe).build_program(Recipe.read(recipe).build_task())
    assert [line.split()[0] for line in out.splitlines()] == ["site", *program.sites]
    assert re.search(r"lora\.query\.A .*Normal\(scale=0\.1\)", out)


def test_fit_writes_a_posterior_that_stands_alone(fitted: Path, recipe: Path) -> None:
    """Law: the folder has guide, seed and recipe; it loads as the posterior that was asked for."""
    meta = json.loads((fitted / "posterior.json").read_text())
    assert meta["guide"]["class"] == "guides.MeanField" and meta["seed"] == 3
    assert [row["step"] for row in meta["history"] if "elbo" in row] == [1, 2, 3]
    saved, original = Recipe.read(fitted / "recipe.yaml"), Recipe.read(recipe)
    assert (saved.base, saved.task, saved.priors) == (original.base, original.task, original.priors)


def test_fit_tells_what_it_did(recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: fit prints the posterior, where it is, and its last ELBO = data − KL + log prior of point estimates."""
    main(["fit", str(recipe), "--output", str(tmp_path / "mf")])
    out = capsys.readouterr().out
    assert "Posterior(MeanField" in out and f"pyrolora evaluate {tmp_path / 'mf'}" in out
    elbo, data, kl, log_prior = map(float, re.findall(r"-?\d+\.\d{4}", out.partition("\nelbo")[2].partition("\n")[0]))
    assert elbo == pytest.approx(data - kl + log_prior, abs=3e-4)
    assert re.search(r"lora\.query: noise_to_mean \d", out)


def test_fit_without_a_logged_step(recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: fewer steps than logging_steps are a fit all the same."""
    main(["fit", str(recipe), "--output", str(tmp_path), "--training.logging_steps", "50", "--guide", "MAP"])
    out = capsys.readouterr().out
    assert "Posterior(MAP" in out and "elbo" not in out


def test_dotted_options_arrive(recipe: Path, tmp_path: Path) -> None:
    """Law: --options.NAME and --training.NAME reach the guide and the Trainer as numbers, words and booleans."""
    options = ["--options.noise", "example", "--options.init_scale", "5e-1", "--temperature", "0.3"]
    training = ["--training.max_steps", "2", "--training.learning_rate", "1e-4", "--training.bf16=false"]
    main(["fit", str(recipe), "--output", str(tmp_path), *options, *training])
    meta = json.loads((tmp_path / "posterior.json").read_text())
    assert meta["guide"]["init"]["noise"] == "example" and meta["guide"]["init"]["init_scale"] == 0.5
    assert meta["temperature"] == 0.3
    assert max(row["step"] for row in meta["history"]) == 2
    saved = Recipe.read(tmp_path / "recipe.yaml")
    assert saved.training == {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-4, "bf16": False}
    assert saved.guides == {"MeanField": {"noise": "example", "init_scale": 0.5}}


def test_same_seed_same_posterior(recipe: Path, fitted: Path, tmp_path: Path) -> None:
    """Law: the same command gives the same numbers; another seed gives others."""
    for seed in ("3", "4"):
        main(["fit", str(recipe), "--output", str(tmp_path / seed), "--seed", seed])
    first, again, other = (load_file(f / "posterior.safetensors") for f in (fitted, tmp_path / "3", tmp_path / "4"))
    assert all((first[name] == again[name]).all() for name in first)
    assert not all((first[name] == other[name]).all() for name in first)


def test_evaluate(fitted: Path, capsys: Captured) -> None:
    """Law: evaluate prints the evaluation of the loaded posterior, τ from the validation split, as JSON or a table."""
    main(["evaluate", str(fitted), "--draws", "4", "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    read = Recipe.read(fitted / "recipe.yaml")
    task = read.build_task()
    posterior = Posterior.from_pretrained(fitted, read.load_base(task, seed=3), task=task)
    assert task.validation is not None and task.test is not None
    tau = fit_scaling(posterior, task.validation, num_draws=4)
    expected = evaluate_posterior(posterior, task.test, scaling=tau, ood=task.ood, num_draws=4).to_dict()
    assert found.pop("split") == "test"
    for left in (found, expected):
        del left["predict_seconds"]
    assert found == expected
    main(["evaluate", str(fitted), "--draws", "4"])
    out = capsys.readouterr().out
    assert f"{expected['metrics']['nll']['value']:.4f}" in out and f"τ = {tau:.2f}" in out


def test_evaluate_other_splits(fitted: Path, capsys: Captured) -> None:
    """Law: every split can be scored, validation without scaling; unknown labels and splits stop with one line."""
    for split, size in (("far", 6), ("train", 24), ("validation", 16)):
        main(["evaluate", str(fitted), "--draws", "0", "--split", split])
        out = capsys.readouterr().out
        assert f"{split}: {size} examples, 1 draw(s)" in out
        assert ("τ" in out) == (split != "validation")
    assert "there are test, validation, train, far" in fails(capsys, "evaluate", fitted, "--split", "farr")
    assert "1 of 1 labels are unknown" in fails(capsys, "evaluate", fitted, "--split", "unknown")


def test_diagnose(fitted: Path, recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: diagnose prints a verdict for each diagnostic with other runs and rivals, and writes JSON and pictures."""
    for seed, random in (("4", "*.A"), ("5", "head.*")):
        main(["fit", str(recipe), "--output", str(tmp_path / seed), "--seed", seed, "--options.random", random])
    capsys.readouterr()
    command = ["diagnose", str(fitted), "--draws", "25", "--output", str(tmp_path / "out")]
    main([*command, "--runs", str(tmp_path / "4"), "--against", str(tmp_path / "5")])
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert len(content["findings"]) == 9 and all(f" {found['name']} " in out for found in content["findings"])
    assert "R-hat over 2 runs" in " ".join(out.split()) and set(content["comparison"]) == {"this", str(tmp_path / "5")}
    assert content["settings"]["num_draws"] == 25
    for name in ("layers.png", "ranks.png", "checks.png"):
        assert (tmp_path / "out" / name).is_file() and name in out
    assert "at least 25, not 24" in fails(capsys, "diagnose", fitted, "--draws", "24")
    assert "match no random site" in fails(capsys, "diagnose", fitted, "--sites", "*.C")


def test_predict(fitted: Path, rows: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: rows without labels are predicted in their order; screen, CSV, JSON Lines and Parquet say the same."""
    main(["predict", str(fitted), str(rows), "--draws", "4"])
    screen = capsys.readouterr().out
    assert "label" not in screen
    for ending in (".csv", ".jsonl", ".parquet"):
        main(["predict", str(fitted), str(rows), "--draws", "4", "--output", str(tmp_path / "new" / f"p{ending}")])
    with (tmp_path / "new" / "p.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["text"] for row in table] == ["a warm house", "the dark cold river", "stone"]
    lines = [json.loads(line) for line in (tmp_path / "new" / "p.jsonl").read_text().splitlines()]
    parquet = pd.read_parquet(tmp_path / "new" / "p.parquet")
    for i, row in enumerate(table):
        assert float(row["p(0)"]) + float(row["p(1)"]) == pytest.approx(1, abs=1e-5)
        assert f"{float(row['confidence']):.3f}" in screen
        for name in ("p(1)", "entropy", "mutual_information"):
            assert float(row[name]) == pytest.approx(lines[i][name], abs=1e-6)
            assert float(row[name]) == pytest.approx(float(parquet[name][i]), abs=1e-6)


def test_predict_bad_files(fitted: Path, rows: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: a missing file, a missing column and unknown endings are one line that names them."""
    assert "none.jsonl does not exist" in fails(capsys, "predict", fitted, tmp_path / "none.jsonl")
    wrong = write_rows(tmp_path / "wrong.jsonl", [{"sentence": "x"}])
    assert "no column 'text'; its columns are sentence" in fails(capsys, "predict", fitted, wrong)
    (tmp_path / "rows.xml").write_text("<a/>")
    assert "cannot read '.xml' files; use one of .jsonl" in fails(capsys, "predict", fitted, tmp_path / "rows.xml")
    message = fails(capsys, "predict", fitted, rows, "--output", tmp_path / "p.xls")
    assert "the ending is one of .csv, .jsonl, .parquet" in message


def test_export(fitted: Path, tmp_path: Path) -> None:
    """Law: the mean and every draw are adapters that stock PEFT loads, with the posterior's own numbers."""
    main(["export", str(fitted), "--draws", "2", "--output", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draw-0", "draw-1", "mean"]
    read = Recipe.read(fitted / "recipe.yaml")
    task = read.build_task()
    posterior = Posterior.from_pretrained(fitted, read.load_base(task), task=task)
    values = {"mean": posterior.mean()["lora.query.B"][1]}
    values |= {f"draw-{s}": posterior.draw(2)["lora.query.B"][s, 1] for s in range(2)}
    for name, expected in values.items():
        model = PeftModel.from_pretrained(read.load_base(task), str(tmp_path / name))
        query = model.get_submodule("base_model.model.bert.encoder.layer.1.attention.self.query")
        assert (query.lora_B["default"].weight == expected).all()


# -- resumption ------------------------------------------------------------------------------------------------------


def test_resume(recipe: Path, tmp_path: Path, capsys: Captured, caplog: pytest.LogCaptureFixture) -> None:
    """Law: --resume, a bare flag, goes on from the last checkpoint; without it fit and checkpoints begin anew."""
    command = ["fit", str(recipe), "--guide", "MAP", "--output", str(tmp_path)]
    steps = ["--training.save_strategy", "steps", "--training.save_steps", "1", "--training.save_total_limit", "9"]
    main([*command, *steps, "--training.max_steps", "2"])
    state = tmp_path / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    written = state.stat().st_mtime_ns
    main([*command, *steps, "--training.max_steps", "4", "--resume"])
    assert state.stat().st_mtime_ns == written
    assert json.loads((tmp_path / "posterior.json").read_text())["history"][-1]["step"] == 4
    assert "without --resume" in fails(capsys, *command, "--resume", "--seed", "1")
    assert "without --resume" in fails(capsys, *command, "--resume", "--guide", "MeanField")
    main([*command, *steps, "--training.max_steps", "2"])
    assert state.stat().st_mtime_ns != written
    assert not state.parent.with_name("checkpoint-4").exists()
    main([*command[:-1], str(tmp_path / "new"), "--resume"])
    assert any("no complete checkpoint" in message for message in caplog.messages)


# -- comparisons -----------------------------------------------------------------------------------------------------


def test_compare_and_report(recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: compare takes guides as a list, prints a table, and writes results and a report that can be made again."""
    main(["compare", str(recipe), "--guides", "MAP", "MeanField", "--seeds", "1", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert {cell["method"] for cell in results["cells"]} == {"LoRA", "MAP", "MeanField"}
    for cell in results["cells"]:
        assert f"{cell['metrics']['nll']['value']:.3f} → {cell['scaled_metrics']['nll']['value']:.3f}" in out
    assert "MeanField − LoRA, scaled: accuracy" in out
    page = (tmp_path / "report.html").read_text()
    assert "MeanField" in page
    (tmp_path / "report.html").unlink()
    posteriors = [str(tmp_path / "MAP-seed0"), str(tmp_path / "MeanField-seed0")]
    two = tmp_path / "two"
    main(["compare", "--posteriors", *posteriors, "--baseline", "MeanField-seed0", "--output", str(two)])
    assert "MAP-seed0 − MeanField-seed0: accuracy" in capsys.readouterr().out
    main(["report", str(tmp_path), str(two)])
    assert (tmp_path / "report.html").read_text() == page
    assert "MAP-seed0" in (two / "report.html").read_text()
    main(["evaluate", str(tmp_path / "LoRA-seed0")])
    assert "1 draw(s)" in capsys.readouterr().out


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fitt RECIPE", "invalid choice: 'fitt' (choose from 'sites', 'fit'"),
        ("fit", "required: fit.recipe"),
        ("compare RECIPE --guides", "--guides: expected at least one argument"),
        ("fit RECIPE --sed 1", "unrecognized arguments: --sed"),
        ("fit RECIPE --seed one", '"seed"'),
        ("fit RECIPE --resume yes", "unrecognized arguments: yes"),
        ("evaluate RECIPE --format xml", '"format"'),
    ],
)
def test_wrong_arguments(recipe: Path, capsys: Captured, arguments: str, message: str) -> None:
    """Law: arguments that cannot be read stop with code 2 and one line that points to --help."""
    said = fails(capsys, *arguments.replace("RECIPE", str(recipe)).split(), code=2)
    assert message in said and "--help" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "fit RECIPE --guide Meanfield",
            "unknown class 'Meanfield'; did you mean 'MeanField'? There are Inducing, Laplace, MAP, MeanField",
        ),
        ("fit RECIPE --options.nois weight", "MeanField: unknown argument 'nois'; did you mean 'noise'?"),
        ("fit RECIPE --options.noise loud", 'noise is "weight" or "example", not \'loud\''),
        ("fit RECIPE --options.random *.C", "*.C"),
        ("fit RECIPE --training.max_step 1", "unknown argument 'max_step'; did you mean 'max_steps'?"),
        ("fit RECIPE --training.max_steps many", "max_steps is a number, not 'many'"),
        ("fit RECIPE --training.weight_decay 0.1", "weight_decay=0.1 is a Normal prior in disguise"),
        ("fit RECIPE --temperature -1", "temperature is a number ≥ 0, not -1"),
        ("sites none.yaml", "none.yaml does not exist"),
        ("compare RECIPE", "name guides to compare it with (--guides)"),
        ("compare", "there is nothing to compare: give recipes, or posteriors"),
        ("compare --posteriors none", "none: no recipe.yaml there; give a folder that pyrolora fit wrote"),
        ("compare RECIPE --guides MAP --processes 0", "--processes is at least 1, not 0"),
        ("compare RECIPE --guides MAP --baseline mode", "the baseline 'mode' is none of the methods LoRA, MAP"),
        ("compare RECIPE --guides MAP Laplac", "unknown guide 'Laplac'; there are LoRA, MAP"),
        ("compare RECIPE --guides MAP --seeds 0", "--seeds is at least 1, not 0"),
        ("evaluate none", "none: no recipe.yaml there; give a folder that pyrolora fit wrote"),
        ("report none", "give a folder that pyrolora compare wrote"),
    ],
)
def test_wrong_values(recipe: Path, tmp_path: Path, capsys: Captured, arguments: str, message: str) -> None:
    """Law: a wrong guide, option, number or folder stops with one line that says what is right, before any training."""
    command = arguments.replace("RECIPE", str(recipe)).split()
    output = ["--output", str(tmp_path / "out")] if command[0] in ("fit", "compare") else []
    assert message in fails(capsys, *command, *output)
    assert not list(tmp_path.glob("**/checkpoint-*")) and not list(tmp_path.glob("**/posterior.json"))


def test_a_folder_that_is_no_posterior(fitted: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: a posterior folder with a file missing or damaged, and a report without results, are named."""
    folder = tmp_path / "copy"
    shutil.copytree(fitted, folder)
    (folder / "posterior.json").write_text("{")
    assert "posterior.json cannot be read" in fails(capsys, "evaluate", folder)
    (folder / "posterior.json").unlink()
    assert "posterior.json does not exist" in fails(capsys, "evaluate", folder)
    (folder / "results.json").write_text('{"format": 1')
    assert "results.json is damaged" in fails(capsys, "report", folder)


def test_another_base(fitted: Path, recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: a folder whose recipe was edited to another base, or to one that is gone, says so."""
    folder = tmp_path / "copy"
    shutil.copytree(fitted, folder)
    text = (fitted / "recipe.yaml").read_text()
    base = str(recipe.parent / "base")
    (folder / "recipe.yaml").write_text(text.replace(base, base + "-gone"))
    assert "cannot be loaded" in fails(capsys, "evaluate", folder)
    shutil.copytree(base, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    doubled = {name: 2 * value for name, value in weights.items()}
    save_file(doubled, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    (folder / "recipe.yaml").write_text(text.replace(base, str(tmp_path / "other")))
    assert "fingerprints differ" in fails(capsys, "evaluate", folder)


# -- help ------------------------------------------------------------------------------------------------------------


def test_every_option_is_explained(capsys: Captured) -> None:
    """Law: help names every command, each command's help explains every option and names the guides where it takes
    one; nothing of the option parser's own is among them."""
    assert set(re.findall(r"^    (\w+) ", helps(capsys), flags=re.M)) == set(COMMANDS)
    for name in COMMANDS:
        text = helps(capsys, name)
        assert "print_config" not in text and "<class" not in text and "Args:" not in text
        listed = text.partition("positional arguments:")[2].partition("guides, with")[0]
        for found in re.finditer(r"^  (-h, --help|--\w+|\w+)(.*(?:\n {4,}.*)*)", listed, flags=re.M):
            assert len(re.sub(r"\b[A-Z]{2,}\b", "", found[2]).split()) > 1, found[0]
    assert "MeanField(random=" in helps(capsys, "fit") and "MAP()" in helps(capsys, "compare")
    assert "(default: 0)" in helps(capsys, "fit") and "(default: MeanField)" in helps(capsys, "fit")


def test_every_example_is_a_command(capsys: Captured) -> None:
    """Law: each line of help that begins with "pyrolora" stands unbroken and can be typed as it stands."""
    seen = set()
    for command in ([], *[[name] for name in COMMANDS]):
        for line in helps(capsys, *command).splitlines():
            if line.startswith("  pyrolora "):
                assert len(line) <= 80
                parsed = build_parser().parse_args(shlex.split(line)[1:])
                assert command in ([], [parsed.subcommand])
                seen.add(parsed.subcommand if command else None)
    assert seen == {None, *COMMANDS}


def test_without_a_command_there_is_help(capsys: Captured) -> None:
    """Law: `pyrolora` alone says what there is."""
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == helps(capsys)


def test_version(capsys: Captured) -> None:
    """Law: --version names the installed version."""
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == f"pyrolora {version('pyrolora')}"


def test_as_a_program() -> None:
    """Law: the module runs as a program, with help on stdout and nothing on stderr."""
    command = [sys.executable, "-m", "pyrolora.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0
    assert done.stdout.startswith("usage: pyrolora ") and "A first session:" in done.stdout
    assert done.stderr == ""

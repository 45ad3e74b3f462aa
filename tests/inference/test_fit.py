"""fit: plain LoRA as a special case, randomness, resumption to the bit, and what stops it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from pyrolora.guides.base import Guide
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.predict import NonFiniteError
from pyrolora.inference.randomness import isolated
from pyrolora.priors.flat import Flat
from pyrolora.program import PyroLoRA
from pyrolora.tasks.sequence_classification import SequenceClassification
from tests.programs import PRIORS, lora, sentence_task, sentences, tiny_bert, tiny_program, tokenizer

ROOT = Path(__file__).parents[2]


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    chosen: dict = {"max_steps": 5, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "disable_tqdm": True}
    chosen |= {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "seed": 0, **changes}
    return TrainingArguments(output_dir=str(folder), **chosen)


def test_map_with_flat_priors_is_peft_with_adamw(tmp_path: Path) -> None:
    """Law: MAP under flat priors takes PEFT + AdamW's steps: parameters agree to fp32 round-off after 50 of them."""
    task = sentence_task()
    options = arguments(tmp_path, max_steps=50, learning_rate=2e-3, remove_unused_columns=False)
    program = tiny_program({"*": Flat()}, dropout=0.1)
    start = program.placement.current()
    posterior = fit(program, MAP(), args=options)

    with isolated(0):
        plain = get_peft_model(tiny_bert(dropout=0.1), lora())
    with isolated(options.seed):
        Trainer(plain, options, train_dataset=task.train, data_collator=task.collate).train()

    state = dict(plain.named_parameters())
    for name, site in program.sites.items():
        reference = torch.stack([state[f"{path}.{parameter}"].detach() for path, parameter in site.holders])
        moved = (reference - start[name]).abs().max()
        assert moved > 1e-3, name
        assert (posterior.mean()[name] - reference).abs().max() < 1e-5 * max(1.0, float(moved)), name


def test_callers_randomness_is_untouched(tmp_path: Path) -> None:
    """Law: fitting changes no global generator, and does not depend on one."""
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = fit(tiny_program(), MeanField(), args=arguments(tmp_path))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = fit(tiny_program(), MeanField(), args=arguments(tmp_path))
    assert all(torch.equal(first.mean()[n], v) for n, v in second.mean().items())


def test_refitting_changes_no_other_posterior(tmp_path: Path) -> None:
    """Law: one guide object can be fitted twice, and another guide on the program leaves the first posterior alone."""
    program, guide = tiny_program(), MeanField()
    first = fit(program, guide, args=arguments(tmp_path))
    mean = first.mean()
    assert not list(guide.parameters())
    again = fit(program, guide, args=arguments(tmp_path, max_steps=9))
    fit(program, MAP(), args=arguments(tmp_path))
    assert all(torch.equal(first.mean()[n], v) for n, v in mean.items())
    assert any(not torch.equal(again.mean()[n], v) for n, v in mean.items())


def test_logs_the_terms_in_nats_per_example(tmp_path: Path) -> None:
    """Law: objective = data − β (kl − log_prior), elbo the same at β = 1, and sites add up to their totals."""
    posterior = fit(tiny_program(), MeanField(), args=arguments(tmp_path), temperature=0.25)
    rows = [row for row in posterior.history if "elbo" in row]
    assert len(rows) == 5
    for row in rows:
        assert row["elbo"] == pytest.approx(row["data"] - row["kl"] + row["log_prior"], rel=1e-5)
        assert row["objective"] == pytest.approx(row["data"] - 0.25 * (row["kl"] - row["log_prior"]), rel=1e-5)
        assert row["loss"] == pytest.approx(-row["objective"], rel=1e-4)
        assert row["kl"] == pytest.approx(sum(v for k, v in row.items() if k.startswith("kl/")), rel=1e-6)
        assert 0.0 < -row["data"] < 10.0
    assert {k for k in rows[0] if k.startswith("kl/")} == {"kl/lora.query.A", "kl/lora.value.A"}
    assert posterior.temperature == 0.25


def test_accumulation_counts_the_kl_once(tmp_path: Path) -> None:
    """Law: two micro-batches of 4 take the step of one batch of 8 (no noise: MAP under Normal priors)."""
    one = fit(tiny_program(), MAP(), args=arguments(tmp_path, per_device_train_batch_size=8))
    two = fit(
        tiny_program(), MAP(), args=arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    )
    assert all(torch.allclose(one.mean()[n], v, atol=1e-5) for n, v in two.mean().items())


def test_activation_checkpointing_gives_the_same_fit(tmp_path: Path) -> None:
    """Law: recomputation in backward sees the same draw: the fit is that without checkpointing."""
    plain = fit(tiny_program(), MeanField(random="*"), args=arguments(tmp_path))
    saved = fit(tiny_program(), MeanField(random="*"), args=arguments(tmp_path, gradient_checkpointing=True))
    assert all(torch.allclose(plain.mean()[n], v, atol=1e-6) for n, v in saved.mean().items())


def test_weight_decay_is_refused(tmp_path: Path) -> None:
    """Law: a prior is declared; weight decay is an undeclared one."""
    with pytest.raises(ValueError, match=r"priors\.Normal"):
        fit(tiny_program(), MAP(), args=arguments(tmp_path, weight_decay=0.01))


def test_split_of_another_size_is_refused(tmp_path: Path) -> None:
    """Law: N in the objective is the number of examples fitted."""
    program = tiny_program()
    assert program.task is not None
    with pytest.raises(ValueError, match="24 examples, the training split has 8"):
        fit(program, MAP(), program.task.train.select(range(8)), arguments(tmp_path))


def test_non_finite_base_model_is_refused_before_training(tmp_path: Path) -> None:
    """Law: NaN in the base model stops before any step."""
    program = tiny_program()
    program.model.base_model.model.bert.embeddings.word_embeddings.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="before any training"):
        fit(program, MeanField(), args=arguments(tmp_path))


def test_non_finite_loss_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    """Law: NaN on some row stops at once, naming step and row; the guide on disk is finite."""
    program = tiny_program()
    assert program.task is not None
    first = {token for i in range(2) for token in program.task.train[i]["input_ids"]}
    token = next(t for row in program.task.train["input_ids"] for t in row if t not in first)
    program.model.base_model.model.bert.embeddings.word_embeddings.weight.data[token] = torch.nan
    with pytest.raises(NonFiniteError, match=r"step 1: .*Rows of the batch.*last-good"):
        fit(program, MeanField(), args=arguments(tmp_path, per_device_train_batch_size=24))
    state = load_file(tmp_path / "last-good" / "posterior.safetensors")
    assert all(torch.isfinite(value).all() for value in state.values())


def test_non_finite_gradient_stops_before_the_update(tmp_path: Path) -> None:
    """Law: a finite loss with a NaN gradient stops before the guide is spoilt, naming the parameter."""

    class Poisoned(MeanField):
        def initialise(self, latent):  # type: ignore[no-untyped-def]
            super().initialise(latent)
            self.loc[latent.name.replace(".", "/")].register_hook(lambda grad: grad * torch.nan)

    with pytest.raises(NonFiniteError, match=r"gradient of loc\.lora/query/A, loc\.lora/value/A is not finite"):
        fit(tiny_program(), Poisoned(), args=arguments(tmp_path))
    state = load_file(tmp_path / "last-good" / "posterior.safetensors")
    assert all(torch.isfinite(value).all() for value in state.values())


def test_what_is_not_finite_after_the_last_step_is_not_saved(tmp_path: Path) -> None:
    """Law: NaN that the last update or the stage after training leaves stops the fit, naming the tensor."""

    class Spoilt(MAP):
        def post_fit(self, program, data):  # type: ignore[no-untyped-def]
            next(self.parameters()).data[:] = torch.nan

    with pytest.raises(NonFiniteError, match=r"after the last step points\.lora/query/A of Spoilt is not finite"):
        fit(tiny_program(), Spoilt(), args=arguments(tmp_path, max_steps=1))


def test_a_full_disk_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """Law: the error names step, folder and the last complete checkpoint, from which the run then ends as one that had
    room."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 100}
    whole = fit(tiny_program(), MeanField(), args=arguments(tmp_path / "whole", **options))
    fit(tiny_program(), MeanField(), args=arguments(tmp_path / "run", **options))
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))
    try:
        with pytest.raises(OSError, match=r"step 4: the checkpoint cannot be written.*checkpoint-2; make room"):
            fit(tiny_program(), MeanField(), args=arguments(tmp_path / "run", **options), resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resumed = fit(tiny_program(), MeanField(), args=arguments(tmp_path / "run", **options), resume=True)
    expected, found = whole.guide.state_dict(), resumed.guide.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_one_row_is_enough(tmp_path: Path) -> None:
    """Law: with one training row and one test row, fit and prediction work; a larger batch is the whole data."""
    row = sentences(1)
    task = SequenceClassification(tokenizer(), train=row, test=row, class_names=["no", "yes"], max_length=16)
    program = PyroLoRA(tiny_bert(), lora(), priors=PRIORS, task=task)
    posterior = fit(program, MeanField(), args=arguments(tmp_path))
    assert torch.isfinite(posterior.predict(task.test, 2).log_mean).all()


SCRIPT = """
import sys
from pathlib import Path
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.fit import fit
from tests.programs import tiny_program
from transformers import TrainingArguments
out, resume = Path(sys.argv[1]), sys.argv[2] == "resume"
args = TrainingArguments(
    output_dir=str(out / "run"), max_steps=40, per_device_train_batch_size=8, learning_rate=1e-2, disable_tqdm=True,
    report_to="none", save_strategy="steps", save_steps=3, save_total_limit=2, logging_steps=1, seed=3, use_cpu=True)
posterior = fit(tiny_program(dropout=0.1), MeanField(random="*"), args=args, resume=resume)
posterior.save_pretrained(out / "posterior")
"""


def run(folder: Path, mode: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), mode], cwd=ROOT, env=environment)


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(tmp_path: Path) -> None:
    """Law: a run killed with SIGKILL at any step and resumed ends with the bits of the run that was not."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, "fresh").wait(300) == 0
    process = run(killed, "fresh")
    deadline = time.monotonic() + 240
    while not (killed / "run" / "checkpoint-9").exists() and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "posterior").exists()
    # A kill while a checkpoint is written leaves one without its last file; it must not be resumed from.
    (killed / "run" / "checkpoint-39").mkdir()
    assert run(killed, "resume").wait(300) == 0
    first, second = (load_file(f / "posterior" / "posterior.safetensors") for f in (whole, killed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    steps = [row["step"] for row in json.loads((killed / "posterior" / "posterior.json").read_text())["history"]]
    assert steps[-1] == 40


def test_default_arguments_keep_no_checkpoints_unless_asked(tmp_path: Path) -> None:
    """Law: without an output folder nothing is written; with one, a checkpoint an epoch."""
    assert default_arguments().save_strategy == "no"
    assert default_arguments(tmp_path).save_strategy == "epoch"


def test_launched_processes_that_would_fit_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: several launched processes whose training arguments leave each alone stop, and the way out is said."""
    arguments = default_arguments()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were launched.*use_cpu=True"):
        fit(tiny_program(), MAP(), args=arguments)


@pytest.mark.parametrize(
    ("guide", "said"),
    [
        (Inducing(init_scale=1e-6, conditional="fixed", conditional_scale=1e-6), "Draws are indistinguishable"),
        (MeanField(random="*", init_scale=1.0), "lost in it, and the posterior is close to the prior"),
        (MAP(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_noise_of_no_use_is_said(
    guide: Guide, said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Law: after a fit whose draws are all one model, or whose update is all noise, a warning says so."""
    fit(tiny_program(), guide, args=arguments(tmp_path, max_steps=1, learning_rate=1e-3))
    words = [record.getMessage() for record in caplog.records if "noise of ΔW" in record.getMessage()]
    assert len(words) == (said is not None) and (said is None or said.lower() in words[0].lower())

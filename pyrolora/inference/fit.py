"""``fit``: from a program, a guide and data to a posterior."""

from __future__ import annotations

import copy
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments

from pyrolora.guides.base import Guide
from pyrolora.inference import processes
from pyrolora.inference.checkpoints import last_checkpoint
from pyrolora.inference.elbo import Objective
from pyrolora.inference.noise import verdict
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.predict import NonFiniteError, not_finite
from pyrolora.inference.randomness import isolated, spawn
from pyrolora.inference.trainer import ELBOTrainer
from pyrolora.program import PyroLoRA, evaluating

logger = logging.getLogger("pyrolora")

# Two names of one option in transformers 5.x.
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")


def default_arguments(output_dir: str | Path | None = None, *, seed: int = 0) -> TrainingArguments:
    """The training arguments that `fit` uses where none are given: suited to hundreds of examples on a small model.

    Args:
        output_dir: Where checkpoints go, one an epoch; None keeps none.
        seed: Of data order, initial noise and draws.
    """
    return TrainingArguments(
        output_dir=str(output_dir or tempfile.gettempdir()),
        learning_rate=2e-3,
        num_train_epochs=12,
        per_device_train_batch_size=16,
        warmup_steps=0.06,
        logging_steps=10,
        save_strategy="epoch" if output_dir else "no",
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),  # else launched processes would not know of one another
        report_to="none",
        seed=seed,
    )


def fit(
    program: PyroLoRA,
    guide: Guide,
    train: Dataset | None = None,
    args: TrainingArguments | None = None,
    *,
    temperature: float = 1.0,
    num_particles: int = 1,
    validation: Dataset | None = None,
    resume: bool = False,
) -> Posterior:
    """Fits a guide to a program by maximising ``L_β`` with `transformers.Trainer`.

    Works on a copy of the guide: the one given is not changed, can be fitted again, and no other posterior changes.
    The caller's random state is not changed either.

    Under ``torchrun`` or ``accelerate launch`` the batches of all processes count as one, each with noise of its own,
    and all end with the same posterior. Laplace's curvature is computed in shares of the rows.

    Args:
        program: The Pyro model.
        guide: Any guide.
        train: The training split; default ``program.task.train``.
        args: All of the Trainer's arguments; default `default_arguments`.
        temperature: β of the objective; 1 is the ELBO. Recorded in the posterior.
        num_particles: Draws per step.
        validation: Split for ``eval_strategy``; default ``program.task.validation`` where one is asked for.
        resume: Continue from the last complete checkpoint in ``args.output_dir``, to the bit on a CPU.

    Returns:
        The posterior.

    Raises:
        NonFiniteError: NaN or infinity in the objective or its gradient; the last good state is in
            ``args.output_dir/last-good`` (a posterior folder).
        ValueError: No training data, ``num_data`` that differs from its size, or launched processes that the training
            arguments leave alone.
    """
    train = _training_split(program, train)
    if bad := not_finite({name: latent.start for name, latent in program.latents.items()}):
        raise NonFiniteError(f"the fit would start from NaN or infinity at {', '.join(bad[:5])}; load the adapter anew")
    args = _own(args or default_arguments(), program)
    if validation is None and program.task is not None and args.eval_strategy != "no":
        validation = program.task.validation
    guide = copy.deepcopy(guide)
    # The Trainer turns training mode on; afterwards every module is in the caller's mode again.
    with isolated(args.seed), evaluating(program.model):
        guide.bind(program)
        guide.to(program.device)
        posterior = Posterior(program, guide, temperature=temperature, seed=args.seed)
        posterior.history = _fit_part(
            posterior, guide, args, train=train, validation=validation, num_particles=num_particles, resume=resume
        )
    _say_whether_the_bound_is_tight(posterior)
    _say_whether_the_noise_is_of_use(posterior)
    return posterior


def _fit_part(
    posterior: Posterior, guide: Guide, args: TrainingArguments, *, train: Dataset, num_particles: int, **options: Any
) -> list[dict[str, Any]]:
    """Fits the guide of a posterior, or the members of an ensemble one after another; returns the log."""
    program = posterior.program
    history = []
    for i, member in enumerate(guide.parts()):
        own = _of_member(args, i)
        with isolated(own.seed):
            rows = _fit_part(posterior, member, own, train=train, num_particles=num_particles, **options)
        history += [{"member": i, **row} for row in rows]
    if guide.parts():
        return history
    if guide.optimise:
        objective = Objective(program, guide, posterior.temperature, num_particles)
        history = _train(objective, posterior, train=train, args=guide.training_arguments(args), **options)
    else:
        _check_first_batch(program, train)
    guide.eval()
    guide.post_fit(program, train)
    _check_finite(guide)
    return history


def _check_finite(guide: Guide) -> None:
    """The last update, or what follows the training, may leave NaN that no further step would notice."""
    if bad := not_finite(guide.state_dict()):
        raise NonFiniteError(
            f"after the last step {', '.join(bad[:5])} of {type(guide).__name__} is not finite; nothing is saved. "
            "Lower the learning rate, check the base model's weights, or widen the prior."
        )


def _of_member(args: TrainingArguments, index: int) -> TrainingArguments:
    """A member's seed, order of data and checkpoints; the first has the ensemble's own seed."""
    own = copy.copy(args)
    own.output_dir = str(Path(args.output_dir or tempfile.gettempdir()) / f"member-{index}")
    if index:
        own.seed = spawn(args.seed, index) % 2**31
        own.data_seed = None if args.data_seed is None else spawn(args.data_seed, index) % 2**31
    return own


def _train(
    objective: Objective,
    posterior: Posterior,
    *,
    train: Dataset,
    validation: Dataset | None,
    args: TrainingArguments,
    resume: bool,
) -> list[dict[str, Any]]:
    """Runs the Trainer; returns its log. A fit that stops on NaN leaves its last good state on disk."""
    program = objective.program
    assert program.task is not None
    trainer = ELBOTrainer(
        objective, args=args, train_dataset=train, eval_dataset=validation, data_collator=program.task.collate
    )
    _check_first_batch(program, train)
    output = Path(args.output_dir or tempfile.gettempdir())
    checkpoint = last_checkpoint(output) if resume else None
    if checkpoint and (log := trainer.finished(checkpoint)) is not None:
        return log
    try:
        with objective.guide.hooks(program):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except NonFiniteError as error:
        folder = posterior.save_pretrained(output / "last-good")
        raise NonFiniteError(f"{error} The last good state is in {folder}.") from None
    return trainer.state.log_history


def _say_whether_the_bound_is_tight(posterior: Posterior) -> None:
    """Warns where the KL dwarfs the data term: σ is then far from the optimum, and the ELBO bounds nothing of use."""
    last = next((row for row in reversed(posterior.history) if "kl" in row), None)
    if posterior.guide.local_sites():
        return  # the KL of each example's latent variables may have a large least value that no scale changes
    if last is not None and last["kl"] > 1 and last["kl"] > 5 * abs(last["data"]):
        logger.warning(
            "The KL is %.1f nats per training example against a data term of %.2f: the guide's scales are far from "
            "the optimum of the ELBO, which is no useful bound here. Judge this posterior by validation, not by its "
            "ELBO; to converge, train longer or start wider (MeanField(init_scale=0.3) and a larger learning rate).",
            last["kl"],
            last["data"],
        )


def _say_whether_the_noise_is_of_use(posterior: Posterior) -> None:
    if posterior.guide.natural_parameters(posterior.program, 1) is not None:
        return  # predictions do not come from draws of the weights
    rows = posterior.describe().items()
    if said := verdict({kind: row["noise_to_mean"] for kind, row in rows if "noise_to_mean" in row}):
        logger.warning("%s", said[0].upper() + said[1:])


@torch.no_grad()
def _check_first_batch(program: PyroLoRA, train: Dataset) -> None:
    """Lets the likelihood look at the logits of two rows: not finite, or probabilities already, is said at once."""
    assert program.task is not None
    batch = program.task.collate([train[i] for i in range(min(2, len(train)))])
    batch = {name: value.to(program.device) for name, value in batch.items()}
    program.likelihood.check_logits(program.logits({}, batch))


def _own(args: TrainingArguments, program: PyroLoRA) -> TrainingArguments:
    """A copy of the arguments, with what the program does itself taken over from the Trainer."""
    if (launched := processes.launched()[1]) > processes.count():
        raise ValueError(
            f"{launched} processes were launched, but under these training arguments each would fit alone; without an "
            "accelerator give TrainingArguments(use_cpu=True)"
        )
    args = copy.copy(args)
    args.remove_unused_columns = False
    # The program's own kind puts the draw back on for the recomputation.
    if any(getattr(args, name, False) for name in CHECKPOINTING):
        program.enable_activation_checkpointing()
        for name in CHECKPOINTING:
            setattr(args, name, False)
    return args


def _training_split(program: PyroLoRA, train: Dataset | None) -> Dataset:
    if program.task is None:
        raise ValueError("fit needs the program's task for its data and collation: PyroLoRA(..., task=task)")
    train = program.task.train if train is None else train
    if train is None or len(train) == 0:
        raise ValueError("there is no training data: give fit a train split")
    if len(train) != program.num_data:
        raise ValueError(
            f"the program weighs the prior against N = {program.num_data} examples, the training split has "
            f"{len(train)}. Build the task on the split that you fit."
        )
    return train

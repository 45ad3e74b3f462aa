"""Training: `transformers.Trainer` over the ELBO, so that its arguments, callbacks and checkpoints are ours too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from pyrolora.guides.base import Step
from pyrolora.inference import processes
from pyrolora.inference.archive import ArchiveError
from pyrolora.inference.checkpoints import check, last_checkpoint, reading, seal
from pyrolora.inference.elbo import Objective, Terms
from pyrolora.inference.predict import NonFiniteError
from pyrolora.inference.randomness import isolated
from pyrolora.tasks.text import TextTask

# How `accelerate launch --use_fsdp` and `--use_deepspeed` tell accelerate, past the training arguments.
LAUNCHER_FLAGS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


class ELBOTrainer(Trainer):
    """A `Trainer` whose model is an `Objective`.

    The loss is ``−L_β / N`` of each (micro-)batch. It is a mean over the batch plus KL/N, so accumulation and data
    parallelism, which average losses, count the KL exactly once per step. Each process has noise of its own.

    Logs the terms of the objective in nats per training example, see `summary`, each the mean over the steps since
    the last log.
    """

    def __init__(self, objective: Objective, **kwargs: Any):
        args: TrainingArguments = kwargs["args"]
        if args.weight_decay:
            raise ValueError(
                f"weight_decay={args.weight_decay} is a Normal prior in disguise. Declare it instead: "
                "priors.Normal(scale) on the sites that should shrink."
            )
        if args.fsdp or args.deepspeed or any(parse_flag_from_env(flag) for flag in LAUNCHER_FLAGS):
            raise ValueError(
                "fsdp and deepspeed shard what is trained, which here is small, and would gather it over the draws. To "
                "share the frozen base between processes leave them out, and call pyrolora.shard(program) before fit."
            )
        self.objective: Objective = objective
        self._terms: list[Terms] = []
        super().__init__(model=objective, **kwargs)
        self.loss_is_scaled_for_ga = False
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(_Progress)
        self.add_callback(_Steps(objective))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser of the training arguments over the guide's own parameter groups."""
        if self.optimizer is None:
            optimiser, options = self.get_optimizer_cls_and_kwargs(self.args)
            groups = self.objective.guide.parameter_groups(self.args.learning_rate)
            self.optimizer = optimiser([{"weight_decay": 0.0, **group} for group in groups], **options)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """``−L_β / N``, checked."""
        with processes.own_noise():
            loss = model(inputs)
        terms = self.objective.elbo.terms
        assert terms is not None
        finite = bool(torch.isfinite(loss))
        if not self._everywhere(finite):
            # All stop together: the others would wait for this one's gradient.
            raise NonFiniteError(
                "the objective is not finite in another process." if finite else self._explain(terms, inputs)
            )
        if self.objective.training:
            self._terms.append(terms)
        return loss

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward, checked before clipping spreads a NaN and an update writes it into the guide."""
        loss = super().training_step(model, *args, **kwargs)
        named = [(name, p.grad) for name, p in self.objective.guide.named_parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([grad for _, grad in named]))
        if not bool(torch.isfinite(norms).all()):
            bad = [name for (name, _), norm in zip(named, norms, strict=True) if not torch.isfinite(norm)]
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the gradient of {', '.join(bad)} is not finite; the guide keeps "
                "its state from before this step. Lower the learning rate, or check the base model's weights."
            )
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> tuple:
        """Validation during training: the same objective, without its gradient."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Common random numbers for every evaluation, and none of the training's: watching changes nothing."""
        with isolated(self.args.seed):
            return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the terms of the objective to what the Trainer logs."""
        if self._terms and "loss" in logs:
            logs = {**logs, **self._over_processes(summary(self._terms, self.objective))}
            self._terms = []
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                seal(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")
        except (OSError, RuntimeError, SafetensorError, ArchiveError) as error:  # torch and safetensors have their own
            raise OSError(
                f"step {self.state.global_step}: the checkpoint cannot be written to {self.args.output_dir}: {error}. "
                f"The last complete one is {last_checkpoint(str(self.args.output_dir))}; make room, and resume."
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading(f"{resume_from_checkpoint}: the guide's state cannot be read"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(f"{checkpoint}: optimizer.pt or scheduler.pt cannot be read"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(f"{checkpoint}: the state of the random numbers cannot be read"):
            super()._load_rng_state(checkpoint)

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        return 0

    def _everywhere(self, condition: bool) -> bool:
        """Whether a condition holds in every process."""
        if self.args.world_size == 1:
            return condition
        holds = torch.tensor(float(condition), device=self.args.device)
        return bool(self.accelerator.reduce(holds, "sum") == self.args.world_size)

    def _over_processes(self, terms: dict[str, float]) -> dict[str, float]:
        """The mean over all processes."""
        if self.args.world_size == 1:
            return terms
        values = torch.tensor(list(terms.values()), dtype=torch.double, device=self.args.device)
        return dict(zip(terms, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def finished(self, checkpoint: Path) -> list[dict[str, Any]] | None:
        """Checks a checkpoint; loads that of a run that has had all its steps, and returns its log, else None.

        The Trainer itself takes one step more where such a run ended within an epoch.
        """
        check(checkpoint)
        with reading(f"{checkpoint / 'trainer_state.json'} cannot be read"):
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if not 0 < self.args.max_steps <= state.global_step:
            return None
        self._load_from_checkpoint(str(checkpoint))
        return state.log_history

    def _explain(self, terms: Terms, inputs: dict[str, Tensor]) -> str:
        where = f"step {self.state.global_step + 1}: the objective is not finite."
        bad_sites = [name for name, value in terms.kl.items() if not torch.isfinite(value)]
        bad_sites += [name for name, p in self.objective.guide.named_parameters() if not torch.isfinite(p).all()]
        rows = [] if terms.rows is None else (~torch.isfinite(terms.rows)).nonzero().flatten().tolist()
        if bad_sites:
            where += f" Not finite at site(s): {', '.join(bad_sites)}."
        if rows:
            where += f" Rows of the batch without a finite likelihood: {rows[:8]}{self._texts(inputs, rows)}."
        return where + " Lower the learning rate, check the base model's weights, or narrow the prior."

    def _texts(self, inputs: dict[str, Tensor], rows: list[int]) -> str:
        task = self.objective.program.task
        if not isinstance(task, TextTask) or "input_ids" not in inputs:
            return ""
        shown = [
            task.tokenizer.decode(inputs["input_ids"][row].flatten(), skip_special_tokens=True) for row in rows[:3]
        ]
        return " (" + "; ".join(repr(text[:80]) for text in shown) + ")"


def summary(terms: list[Terms], objective: Objective) -> dict[str, float]:
    """Means of the objective's terms over steps, in nats per training example.

    ``objective = data − β (kl − log_prior)`` and ``elbo`` is the same at β = 1. ``kl`` is over random sites;
    ``log_prior`` is the prior's log density at sites with a point estimate, whose KL would be infinite.
    """
    size = objective.program.num_data
    data = torch.stack([t.data for t in terms]).mean().item() / size
    cost = {name: torch.stack([t.kl[name] for t in terms]).mean().item() / size for name in terms[0].kl}
    kl = {name: value for name, value in cost.items() if name not in terms[0].points}
    log_prior = {name: 0.0 - value for name, value in cost.items() if name in terms[0].points}
    total = sum(cost.values())
    return {
        "elbo": data - total,
        "objective": data - objective.elbo.temperature * total,
        "data": data,
        "kl": sum(kl.values()),
        "log_prior": sum(log_prior.values()),
        **{f"kl/{name}": value for name, value in kl.items()},
        **{f"log_prior/{name}": value for name, value in log_prior.items()},
    }


class _Steps(TrainerCallback):
    """Tells the guide of every step."""

    def __init__(self, objective: Objective):
        self.objective = objective

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._rate = kwargs["optimizer"].param_groups[0]["lr"]
        self.objective.guide.before_step(self._step(state.global_step + 1, state))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        with torch.no_grad():
            self.objective.guide.after_step(self._step(state.global_step, state))

    def _step(self, number: int, state: TrainerState) -> Step:
        objective = self.objective
        return Step(number, state.max_steps, self._rate, objective.elbo.temperature, objective.program.num_data)


class _Progress(ProgressCallback):
    """The Trainer's progress bar, with the objective beside it in place of a printed line for each log."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "elbo" in logs:
            self.training_bar.set_postfix(
                elbo=f"{logs['elbo']:.3f}", data=f"{logs['data']:.3f}", kl=f"{logs['kl']:.3f}"
            )

"""The posterior: what `fit` returns, and all that one does with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from pyro import poutine
from torch import Tensor, nn
from xarray import DataTree

from pyrolora.adapters.checkpoint import export_adapter
from pyrolora.guides.base import Guide, matches
from pyrolora.inference import archive, datatree, processes
from pyrolora.inference.density import paired_traces, traces, values_of
from pyrolora.inference.display import table
from pyrolora.inference.inputs import describe_inputs, in_order
from pyrolora.inference.noise import noise_to_mean
from pyrolora.inference.predict import Function, Runner, check_data, log_likelihood, log_probabilities
from pyrolora.inference.prediction import Prediction, PredictionBuilder
from pyrolora.inference.randomness import isolated, spawn
from pyrolora.inference.restore import restore
from pyrolora.likelihoods.base import ClassLikelihood
from pyrolora.likelihoods.next_token import NextToken
from pyrolora.priors.base import Prior
from pyrolora.program import Latent, PyroLoRA
from pyrolora.tasks.base import Task


class Posterior:
    """An approximate posterior over the adapters: a program and a fitted guide.

    Args:
        program: The Pyro model.
        guide: A guide bound to it.
        temperature: β of the objective that was maximised.
        seed: Of the fit.

    Attributes:
        history: What the Trainer logged: objective, data term and KL of each site, in nats per training example.
        scaling: Temperature τ of the predictive, set by calibration; 1 changes nothing.
    """

    def __init__(self, program: PyroLoRA, guide: Guide, *, temperature: float = 1.0, seed: int = 0):
        self.program = program
        self.guide = guide
        self.temperature = temperature
        self.seed = seed
        self.scaling = 1.0
        self.history: list[dict[str, Any]] = []

    # -- draws -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(self, num_draws: int = 1, *, seed: int = 0) -> dict[str, Tensor]:
        """Draws every site of the posterior, auxiliary sites of the guide (inducing matrices) too.

        Draw s depends on ``seed`` and s alone, so that more draws extend fewer, and all inputs see the same ones.

        Returns:
            ``{site: (num_draws, *site_shape)}``.
        """
        if num_draws < 1:
            raise ValueError(f"num_draws is at least 1, not {num_draws}")
        return _stack([values_of(trace) for trace in traces(self.guide, num_draws, seed=seed)])

    def mean(self) -> dict[str, Tensor]:
        """One value of every site that stands for the whole posterior, ``{site: site_shape}``."""
        return self.guide.mean()

    def describe(self, num_draws: int = 16) -> dict[str, dict[str, float]]:
        """What was learnt, in numbers: those that the guide has for each site, and the noise of each kind of module.

        Args:
            num_draws: Draws from which ``noise_to_mean``, ``√(E‖ΔW − ΔW̄‖²)/‖ΔW̄‖``, is estimated.

        Returns:
            ``{site or kind: {name: number}}``; empty for a point estimate.
        """
        rows = self.guide.describe()
        if not self.guide.random_sites():
            return rows
        draws = self.draw(num_draws, seed=self.seed)
        for kind, ratio in noise_to_mean(self.program.sites, draws, self.mean()).items():
            rows.setdefault(kind, {})["noise_to_mean"] = ratio
        return rows

    # -- predictions -------------------------------------------------------------------------------------------------

    def predict(
        self,
        data: Dataset,
        num_draws: int = 16,
        *,
        seed: int = 0,
        batch_size: int = 32,
        chunk_size: int | None = None,
        vectorise: bool | None = None,
    ) -> Prediction:
        """The posterior predictive over classes: probabilities averaged over draws, at the temperature `scaling`.

        Args:
            data: A tokenised split of the task (`task.test`, or `task.tokenise(rows)`).
            num_draws: S; 0 uses the posterior's mean weights in place of draws. A guide without random sites runs once.
            seed: Of the draws.
            batch_size: Rows at once.
            chunk_size: Draws at once; None for as many as the likelihood says, eight for classes.
            vectorise: Whether draws run together under `torch.vmap`; None does so where it pays.

        Raises:
            TypeError: A likelihood without classes.
            NonFiniteError: Probabilities that are not finite; it names their rows and draws, and what may be wrong.
        """
        if not isinstance(self.program.likelihood, ClassLikelihood):
            kind = type(self.program.likelihood).__name__
            raise TypeError(
                f"predict gives class probabilities; for the likelihood {kind} use logits or log_likelihood"
            )
        runner = self.runner(num_draws, seed=seed, chunk_size=chunk_size, vectorise=vectorise)
        builder = None
        order: list[int] = []
        inputs: list[dict[str, Tensor]] = []
        for rows, batch in runner.batches(data, batch_size=batch_size):
            values = runner.evaluate(log_probabilities(self.program), batch)
            runner.check(values, rows, data, "probabilities")
            joint = runner.natural is None or self.guide.joint_draws
            builder = builder or PredictionBuilder(len(data), len(values), self._class_names(), joint=joint)
            builder.add(values)
            # Of the same batch, whose features the guide has computed already.
            inputs.append(self.guide.describe_inputs(batch))
            order += rows
        columns = {name: data[name][:] for name in ("labels", "text") if name in data.column_names}
        assert builder is not None
        prediction = builder.build(torch.tensor(order), columns).scaled(self.scaling)
        return replace(prediction, inputs=in_order(inputs, order))

    def log_likelihood(
        self,
        data: Dataset,
        num_draws: int = 16,
        *,
        sites: str | Sequence[str] = "*",
        seed: int = 0,
        batch_size: int = 32,
        chunk_size: int | None = None,
    ) -> Tensor:
        """``log p(y_n | x_n, θ_s)`` in nats, ``(S, n)``: what LOO, WAIC and perplexity are made from.

        Random sites that do not match ``sites`` stand at their mean.

        Raises:
            NonFiniteError: NaN, as `predict` says.
        """
        runner = self.runner(num_draws, seed=seed, chunk_size=chunk_size, sites=sites)
        return self._collect(runner, log_likelihood(self.program), data, batch_size)

    def logits(
        self, data: Dataset, num_draws: int = 16, *, seed: int = 0, batch_size: int = 32, chunk_size: int | None = None
    ) -> Tensor:
        """The likelihood's natural parameters under each draw, ``(S, n, ...)``.

        For regression these are draws of the mean function: their mean over S predicts, their standard deviation is
        the epistemic uncertainty, and the noise scale is the site ``likelihood.scale``.

        Raises:
            ValueError: Next tokens of texts that differ in length, whose logits are no one tensor.
            NonFiniteError: NaN, as `predict` says.
        """
        check_data(data)
        if isinstance(self.program.likelihood, NextToken) and len({len(ids) for ids in data["input_ids"]}) > 1:
            raise ValueError(
                "logits of next tokens are one tensor for texts of one length only. Use log_likelihood, or "
                "diagnostics.token_uncertainty for each token, or select rows of one length"
            )
        runner = self.runner(num_draws, seed=seed, chunk_size=chunk_size)
        return self._collect(runner, self.program.logits, data, batch_size)

    def _collect(self, runner: Runner, function: Function, data: Dataset, batch_size: int) -> Tensor:
        parts, order = [], []
        for rows, values in runner.run(function, data, batch_size=batch_size):
            runner.check(values, rows, data, "values")
            parts.append(values.cpu())
            order += rows
        return torch.cat(parts, 1)[:, torch.argsort(torch.tensor(order))]

    def runner(
        self,
        num_draws: int = 16,
        *,
        seed: int = 0,
        chunk_size: int | None = None,
        vectorise: bool | None = None,
        sites: str | Sequence[str] = "*",
    ) -> Runner:
        """What runs the base model under S draws of the posterior; arguments as those of `predict`."""
        natural = self.guide.natural_parameters(self.program, num_draws, seed=seed) if num_draws > 0 else None
        if natural is not None:
            return Runner(self.program, {}, self.mean(), natural=natural)
        random = {name for name in self.guide.random_sites() if matches(name, sites)} if num_draws > 0 else set()
        fixed = {name: value for name, value in self.mean().items() if name not in random}
        draws = self.draw(self.guide.draws_for(num_draws), seed=seed) if random else {}
        draws = {name: value for name, value in draws.items() if name in random}
        return Runner(self.program, draws, fixed, chunk_size=chunk_size, vectorise=vectorise)

    def _class_names(self) -> tuple[str, ...]:
        return self.program.task.class_names if self.program.task is not None else ()

    # -- ArviZ -------------------------------------------------------------------------------------------------------

    def to_datatree(
        self,
        data: Dataset | None = None,
        num_draws: int = 100,
        *,
        var_names: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> DataTree:
        """The posterior as an ArviZ ``DataTree``.

        Groups: ``posterior`` and ``prior`` with dims (chain, draw, layer, rank, ...); ``sample_stats`` with
        ``log_prior`` and ``log_guide`` of each draw; given data, also ``log_likelihood``, ``posterior_predictive`` (for
        class likelihoods), ``observed_data``, and ``constant_data`` where the guide has numbers for each input. Draws
        of a guide are independent: they are one chain, and R-hat within it says nothing.

        Args:
            data: A tokenised split.
            num_draws: S.
            var_names: Patterns of the sites to include; a 7B model has too many numbers for all.
            seed: Of the draws.

        Raises:
            ValueError: More than 20 million numbers in a group.
        """
        if self.guide.random_sites():
            num_draws = max(self.guide.draws_for(num_draws), num_draws)  # an ensemble's members count the same
        latents = datatree.select({**self.program.latents, **self._auxiliary()}, var_names)
        datatree.check_size(latents, num_draws)
        prior = poutine.reparam(self.program.sample_latents, config=self.guide.reparametrisations())
        rows, densities = [], []
        for q, p in paired_traces(self.program, self.guide, num_draws, seed=seed):
            rows.append(values_of(q))
            densities.append(
                {"log_prior": torch.as_tensor(p.log_prob_sum()), "log_guide": torch.as_tensor(q.log_prob_sum())}
            )
        draws, stats = _stack(rows), _stack(densities)
        groups = {
            "posterior": {latent.name: datatree.as_chain(draws[latent.name]) for latent in latents},
            "prior": datatree.prior_draws(prior, latents, num_draws=num_draws, seed=seed),
            "sample_stats": {name: datatree.as_chain(value) for name, value in stats.items()},
        }
        if data is not None:
            groups |= self._data_groups(data, num_draws, seed)
        return datatree.build(self.program, latents, groups, {"guide": repr(self), "temperature": self.temperature})

    def _data_groups(self, data: Dataset, num_draws: int, seed: int) -> dict[str, dict[str, Any]]:
        site = self.program.likelihood.site
        values = self.log_likelihood(data, num_draws, seed=seed)
        # Without random sites there is one pass; the tree has a row for every draw all the same. Guides that predict
        # from natural parameters have as many points of those as they choose.
        rows = num_draws if len(values) == 1 else len(values)
        groups = {"log_likelihood": {site: datatree.as_chain(values.expand(rows, -1))}}
        inputs = describe_inputs(self.program, self.guide, data)
        groups["constant_data"] = {name: value.numpy() for name, value in inputs.items()}
        if isinstance(self.program.likelihood, ClassLikelihood):
            draws = self.predict(data, num_draws, seed=seed).draws
            if draws is not None:
                probabilities = draws.exp().expand(rows, -1, -1)
                generator = torch.Generator().manual_seed(spawn(seed, num_draws))
                labels = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator)
                groups["posterior_predictive"] = {site: datatree.as_chain(labels.reshape(rows, -1))}
            groups["observed_data"] = {site: np.asarray(data[site][:])}
        return groups

    @torch.no_grad()
    def _auxiliary(self) -> dict[str, Latent]:
        """The guide's auxiliary sites, named after the site that they belong to, described as latents are."""
        with poutine.block(), isolated(self.seed):
            values = values_of(poutine.trace(self.guide).get_trace())
        found = {}
        for name, value in values.items():
            if name not in self.program.latents:
                owner = self.program.latents[name.rsplit(".", 1)[0]]
                found[name] = replace(owner, name=name, shape=value.shape, start=value)
        return found

    # -- files -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the posterior: ``posterior.safetensors``, ``posterior.json``, and PEFT's ``adapter_config.json``.

        The base weights are not in it, only their fingerprint. Of several processes only the first writes,
        and the others do not wait for it: whoever reads the folder next comes after ``torch.distributed.barrier()``.
        """
        folder = Path(folder)
        if processes.rank() > 0:
            return folder
        config = self.program.model.peft_config[self.program.adapter_name]
        archive.write(folder, state=self.guide.state_dict(), meta=self._meta(), adapter=config)
        return folder

    def _meta(self) -> dict[str, Any]:
        program = self.program
        return {
            "guide": archive.describe(self.guide),
            "priors": archive.describe(program.declared),
            "likelihood": archive.describe(program.likelihood),
            "num_data": program.num_data,
            "temperature": self.temperature,
            "scaling": self.scaling,
            "seed": self.seed,
            "class_names": list(self._class_names()),
            "sites": {name: list(site.shape) for name, site in program.sites.items()},
            "fingerprint": program.fingerprint,
            "versions": {name: version(name) for name in ("torch", "pyro-ppl", "peft", "transformers")},
            "history": self.history,
        }

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        base_model: nn.Module,
        *,
        task: Task | None = None,
        priors: Mapping[str, Prior] | None = None,
    ) -> Posterior:
        """Loads a posterior onto a base model.

        Args:
            folder: What `save_pretrained` wrote.
            base_model: The same base model, without adapters. The adapters are injected into it.
            task: For predictions: the data's tokenizer and collation.
            priors: Needed where a prior was somebody's own function, which no file can hold.

        Raises:
            ArchiveError: Missing, truncated or foreign files, another base model, other sites, or a description that
                asks for more than the files hold.
        """
        program, guide, meta = restore(Path(folder), base_model, priors)
        program.task = task
        posterior = cls(program, guide, temperature=meta["temperature"], seed=meta["seed"])
        posterior.scaling, posterior.history = meta["scaling"], meta["history"]
        return posterior

    def export_peft(self, folder: str | Path, draw: str | int = "mean", *, seed: int = 0) -> Path:
        """Writes one ordinary PEFT adapter: the posterior's mean, or draw number ``draw``.

        The mean is for serving at no cost; n draws are n adapters, an ensemble for a multi-adapter server.

        Args:
            folder: Where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
            draw: ``"mean"``, or the index of a draw (of those that `draw` gives for the same seed).
            seed: Of the draws.

        Raises:
            ValueError: No such draw, or noise of each input, which fits no adapter.
            ArchiveError: The folder cannot be written to, or the disk is full.
        """
        if draw == "mean":
            values = self.mean()
        elif self.guide.local_sites():
            raise ValueError(f"{type(self.guide).__name__}: noise of each input fits no adapter file; export the mean")
        elif isinstance(draw, int) and draw >= 0:
            values = {name: value[draw] for name, value in self.draw(draw + 1, seed=seed).items()}
        else:
            raise ValueError(f'draw is "mean" or an index ≥ 0, not {draw!r}')
        adapters = {name: value for name, value in values.items() if name in self.program.sites}
        with archive.replacing_all(Path(folder), last="adapter_config.json") as new:
            export_adapter(self.program.model, self.program.placement, values=adapters, folder=new)
        return Path(folder)

    def _repr_html_(self) -> str:
        return table(repr(self), self.program, self.guide, self.history)

    def __repr__(self) -> str:
        random = self.guide.random_sites()
        size = sum(self.program.latents[name].shape.numel() for name in random)
        local = self.guide.local_sites()
        return (
            f"Posterior({type(self.guide).__name__}, β={self.temperature:g}, seed={self.seed}: "
            f"{len(random)} of {len(self.program.latents)} sites random, {size:,} weights"
            f"{f'; noise of each input at {len(local)}' if local else ''})"
        )


def _stack(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    # Auxiliary sites that only some members of an ensemble have are none of the ensemble's.
    shared = [name for name in items[0] if all(name in item for item in items)]
    return {name: torch.stack([item[name] for item in items]) for name in shared}

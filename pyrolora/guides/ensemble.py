"""Ensembles: the uniform mixture of several fits of any guide."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor, nn

from pyrolora.guides.base import Card, Guide
from pyrolora.guides.map import MAP
from pyrolora.program import Batch, Latent, PyroLoRA

# PEFT's initialisations that are independent entries, so that another order of them is another draw.
_EXCHANGEABLE = (True, "gaussian")


class Ensemble(Guide):
    """``q(θ) = (1/M) Σ_m q_m(θ)``: M fits of one guide, or one fit of each of several, that differ in seed.

    `fit` trains the members one after another. Member m has its own order of data and its own start: the first is a
    plain fit with the ensemble's seed, the others draw the matrices of a fresh adapter again (its product stays zero);
    an adapter that was trained already, and the head, start for all where they stand. Members that were fitted by
    separate processes are put together by `pyrolora.join`.

    Draw s comes from member ``s mod M``, and a prediction takes the next multiple of M draws, so that every member
    counts the same; of points it takes M. The posterior's mean is the first member's: averages of factors B and A that
    started apart are no average of ``B A``.

    Args:
        guide: Any guide, an ensemble too; or one for each member.
        size: M.

    Source: Lakshminarayanan et al. 2017; of posteriors, Wilson & Izmailov 2020 (multi-SWAG), section 3.
    """

    card = Card("which of M fits it is", "M fits", "M, or M times the members'")

    def __init__(self, guide: Guide | Sequence[Guide] | None = None, size: int | None = None):
        super().__init__()
        if size is not None and size < 1:
            raise ValueError(f"Ensemble: size is at least 1, not {size}")
        self._templates = [MAP() if guide is None else guide] if guide is None or isinstance(guide, Guide) else [*guide]
        self._single = guide is None or isinstance(guide, Guide)
        if not self._templates or not all(isinstance(each, Guide) for each in self._templates):
            raise ValueError(f"Ensemble: guide is a guide, or a list of guides, not {guide!r}")
        if not self._single and size not in (None, len(self._templates)):
            raise ValueError(f"Ensemble: {len(self._templates)} guides are given for {size} members; leave size out")
        self.size = (5 if size is None else size) if self._single else len(self._templates)
        self.members = nn.ModuleList()
        self._chosen = 0

    @property
    def guide(self) -> Guide | list[Guide]:
        """What it was constructed with."""
        return self._templates[0] if self._single else self._templates

    @property
    def optimise(self) -> bool:  # type: ignore[override]
        """Whether any member runs the optimiser."""
        return any(each.optimise for each in self._templates)

    # -- contract ----------------------------------------------------------------------------------------------------

    def bind(self, program: PyroLoRA) -> None:
        self.latents = dict(program.latents)
        self.members = nn.ModuleList()
        for i in range(self.size):
            part = copy.deepcopy(self._templates[0 if self._single else i])
            part.bind(program if i == 0 else restarted(program))
            self.members.append(part)

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        if self.turn is not None:
            self._chosen = self.turn % self.size
        elif self.size > 1:
            self._chosen = int(torch.randint(self.size, ()))
        part = self.parts()[self._chosen]
        part.turn = None if self.turn is None else self.turn // self.size
        return part(batch)

    def parts(self) -> Sequence[Guide]:
        return list(self.members)  # type: ignore[arg-type]

    def is_random(self, latent: Latent) -> bool:
        """Every site where there are several members; of one, what that one says."""
        return self.size > 1 or self.parts()[0].is_random(latent)

    def mean(self) -> dict[str, Tensor]:
        return self.parts()[0].mean()

    def passes(self, num_draws: int, num_outputs: int) -> int:
        if num_draws == 0:
            return 1
        each = math.ceil(num_draws / self.size)
        return self.size * max(part.passes(each, num_outputs) for part in self.parts())

    def draws_for(self, num_draws: int) -> int:
        """The next multiple of M, so that every member counts the same."""
        each = math.ceil(num_draws / self.size)
        return self.size * max(part.draws_for(each) for part in self.parts()) if each else 1

    @property
    def joint_draws(self) -> bool:
        return all(part.joint_draws for part in self.parts())

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        return [group for part in self.parts() for group in part.parameter_groups(learning_rate)]

    def reparametrisations(self) -> dict[str, Reparam]:
        return {name: _Chosen(self, name) for part in self.parts() for name in part.reparametrisations()}

    def augmented(self, program: PyroLoRA) -> Callable[..., Tensor]:
        if any(part.local_sites() for part in self.parts()):
            raise ValueError(
                "Ensemble: members with local latent variables cannot share one run of Pyro's SVI; pyrolora.fit trains "
                "them one after another"
            )
        return super().augmented(program)

    def describe(self) -> dict[str, dict[str, float]]:
        """What each member learnt, ``member 0: <site>`` and so on."""
        return {f"member {i}: {name}": row for i, p in enumerate(self.parts()) for name, row in p.describe().items()}

    def natural_parameters(
        self, program: PyroLoRA, num_draws: int, *, seed: int = 0
    ) -> Callable[[Batch], Iterable[Tensor]] | None:
        """The members' own, where one of them predicts by other means than draws of the weights."""
        each = math.ceil(num_draws / self.size)
        seeds = [seed + 7919 * i for i in range(self.size)]
        found = [p.natural_parameters(program, each, seed=s) for p, s in zip(self.parts(), seeds, strict=True)]
        if all(function is None for function in found):
            return None
        functions = [
            _by_draws(part, program, each, seed=s) if function is None else function
            for part, function, s in zip(self.parts(), found, seeds, strict=True)
        ]
        return lambda batch: _balanced([torch.stack([*function(batch)]) for function in functions])


class _Chosen(Reparam):
    """The rewriting of a model's statement that the member in use asks for."""

    def __init__(self, ensemble: Ensemble, name: str):
        self.ensemble, self.name = ensemble, name

    def apply(self, msg: Any) -> Any:
        own = self.ensemble.parts()[self.ensemble._chosen].reparametrisations()
        return own[self.name].apply(msg) if self.name in own else {**msg}


def restarted(program: PyroLoRA) -> PyroLoRA:
    """The same program, in which a fresh adapter's random matrices are drawn again for guides to start from.

    A fresh pair (B or A zero, so that ΔW = 0) gets the entries of its other matrix in another random order, which is
    another draw of whatever distribution PEFT took. Trained adapters, other initialisations and heads stay.
    """
    again = copy.copy(program)
    config: Any = program.model.peft_config[program.adapter_name]
    if config.init_lora_weights in _EXCHANGEABLE:
        again.latents = {name: _redrawn(latent, program.latents) for name, latent in program.latents.items()}
    return again


def _redrawn(latent: Latent, latents: Mapping[str, Latent]) -> Latent:
    if latent.group is None or latent.group.role not in ("A", "B"):
        return latent
    stem, role = latent.name.rsplit(".", 1)
    partner = latents.get(f"{stem}.{'B' if role == 'A' else 'A'}")
    if partner is None or bool(partner.start.any()):
        return latent
    order = torch.randperm(latent.start.numel()).to(latent.start.device)
    return dataclasses.replace(latent, start=latent.start.flatten()[order].reshape(latent.shape))


def _by_draws(part: Guide, program: PyroLoRA, num_draws: int, *, seed: int) -> Callable[[Batch], Iterable[Tensor]]:
    """Natural parameters under draws of the weights."""
    draws = list(_draws(part, part.draws_for(num_draws), seed=seed))
    return lambda batch: (program.logits(draw, batch) for draw in draws)


@torch.no_grad()
def _draws(part: Guide, num_draws: int, *, seed: int) -> Iterator[dict[str, Tensor]]:
    with torch.random.fork_rng():
        for s in range(num_draws):
            torch.manual_seed(seed * 1_000_003 + s)
            part.turn = s
            yield part()
        part.turn = None


def _balanced(values: Sequence[Tensor]) -> Tensor:
    """Members' draws ``(S_m, b, K)`` in one tensor in which all members have the same number of rows."""
    most = math.lcm(*(len(value) for value in values))
    return torch.cat([value.repeat(most // len(value), 1, 1) for value in values])

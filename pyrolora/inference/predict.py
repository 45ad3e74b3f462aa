"""Runs the base model under many draws: vectorised over draws, in batches, with common random numbers."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from pyrolora.adapters.shards import is_sharded
from pyrolora.program import NATURAL, Batch, PyroLoRA, evaluating

logger = logging.getLogger("pyrolora")

Draws = Mapping[str, Tensor]
Function = Callable[[Draws, Mapping[str, Tensor]], Tensor]


# What torch says of operations that vmap cannot follow; any other error is the user's to see.
_NOT_VECTORISABLE = re.compile("vmap|functorch|[Bb]atching rule|BatchedTensor")


class NonFiniteError(RuntimeError):
    """An objective, a gradient or a probability is NaN or infinite; the message says where."""


class Runner:
    """Evaluates a function of (one draw, batch) for all draws and batches of a data set.

    Random sites are batched by `torch.vmap`, the others are placed as they are: whatever precedes the first random
    layer is computed once for all draws. Architectures that vmap cannot follow (routing that depends on activations)
    are run draw by draw, with the same numbers.

    Args:
        program: The Pyro model.
        draws: Random sites, ``{site: (S, *shape)}``; the same draws serve every input.
        fixed: Sites without randomness, ``{site: shape}``.
        chunk_size: How many draws run at once; bounds memory. None: as many as the likelihood says.
        vectorise: False runs draw by draw. None decides: together on an accelerator, which a single draw of a small
            batch leaves half idle, and wherever a fifth of the model or more precedes the first random layer; one by
            one on a CPU otherwise, where batched products of small matrices cost more than they save, and where no
            more than one runs at once.
        natural: In place of draws of the weights: a batch's draws of the natural parameters, S of ``(b, K)``.
    """

    def __init__(
        self,
        program: PyroLoRA,
        draws: Draws,
        fixed: Draws,
        *,
        chunk_size: int | None = None,
        vectorise: bool | None = None,
        natural: Callable[[Batch], Iterable[Tensor]] | None = None,
    ):
        self.program = program
        self.draws = dict(draws)
        self.fixed = dict(fixed)
        self.chunk_size = chunk_size or program.likelihood.draws_at_once
        self.natural = natural
        if vectorise is None:
            pays = program.device.type != "cpu" or shared_prefix(program, draws) >= 0.2
            vectorise = pays and self.chunk_size > 1 and not is_sharded(program.model)
        self.vectorise = vectorise

    @torch.no_grad()
    def run(self, function: Function, data: Dataset, *, batch_size: int = 32) -> Iterator[tuple[list[int], Tensor]]:
        """Yields ``(rows, values)`` batch by batch, longest texts first: ``values`` is ``(S, b, ...)``.

        Args:
            function: Of one draw (all sites) and a batch; its result has the batch first.
            data: A tokenised split.
            batch_size: Rows of a batch.
        """
        for rows, batch in self.batches(data, batch_size=batch_size):
            yield rows, self.evaluate(function, batch)

    def batches(self, data: Dataset, *, batch_size: int = 32) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yields ``(rows, batch)``, longest texts first; meanwhile the model is in evaluation mode."""
        check_data(data)
        if self.program.task is None:
            raise ValueError("prediction needs the program's task for its collation: PyroLoRA(..., task=task)")
        order = _by_length(data)
        plain = data.remove_columns([c for c in ("text",) if c in data.column_names])
        with evaluating(self.program.model):
            for start in tqdm(range(0, len(order), batch_size), desc="predict", delay=3, leave=False):
                rows = order[start : start + batch_size]
                batch = self.program.task.collate([plain[i] for i in rows])
                yield rows, {name: value.to(self.program.device) for name, value in batch.items()}

    @torch.no_grad()
    def evaluate(self, function: Function, batch: Mapping[str, Tensor]) -> Tensor:
        """The function under every draw for one batch: ``(S, b, ...)``."""
        if self.vectorise and self.natural is None and self.draws:
            try:
                return self._vectorised(function, batch)
            except RuntimeError as error:
                if not _NOT_VECTORISABLE.search(str(error)):
                    raise
                logger.info("this architecture cannot be vectorised over draws; running them one by one (%s)", error)
                self.vectorise = False
        return torch.stack(list(self.each(function, batch)))

    @torch.no_grad()
    def each(self, function: Function, batch: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The function under one draw after another, S of ``(b, ...)``, of which none is kept."""
        if self.natural is not None:
            for f in self.natural(batch):
                yield function({**self.fixed, NATURAL: f}, batch)
        elif not self.draws:
            yield function(self.fixed, batch)
        else:
            for s in range(len(next(iter(self.draws.values())))):
                yield function({**self.fixed, **{name: value[s] for name, value in self.draws.items()}}, batch)

    def check(self, values: Tensor, rows: Sequence[int], data: Dataset, what: str) -> None:
        """Refuses values of some rows of the data, ``(S, b, ...)``, that are NaN.

        Raises:
            NonFiniteError: It names rows and draws, and what is not finite: weights, inputs, or the base model.
        """
        bad = values.isnan().reshape(*values.shape[:2], -1).any(-1)
        if not bool(bad.any()):
            return
        draws = bad.any(1).nonzero().flatten().tolist()
        wrong = sorted(rows[i] for i in bad.any(0).nonzero().flatten().tolist())
        under = "every draw" if len(draws) == len(values) else f"draw(s) {_few(draws)}"
        raise NonFiniteError(
            f"the {what} of row(s) {_few(wrong)} are not finite under {under}: {self._cause(data, wrong[:8])}"
        )

    def _cause(self, data: Dataset, rows: Sequence[int]) -> str:
        assert self.program.task is not None
        if weights := not_finite({**self.fixed, **self.draws}):
            return f"NaN or infinity in the posterior's weights at {_few(weights)}; fit it again"
        if inputs := not_finite(self.program.task.collate([data[i] for i in rows])):
            return f"NaN or infinity in their inputs {_few(inputs)}; correct or leave out these rows"
        if base := not_finite(dict(self.program.model.named_parameters())):
            return f"NaN or infinity in the base model's weights {_few(base)}; load another checkpoint"
        return (
            "weights and inputs are finite, so the base model overflows. Load it in float32 or bfloat16, or look for "
            "draws far from the mean (posterior.describe())"
        )

    def _vectorised(self, function: Function, batch: Mapping[str, Tensor]) -> Tensor:
        one = torch.vmap(
            lambda draws: function({**self.fixed, **draws}, batch), randomness="same", chunk_size=self.chunk_size
        )
        with warnings.catch_warnings():
            # Attention kernels run once for each draw of a chunk: no faster, and nothing that the user could change.
            warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
            return one(self.draws)


def shared_prefix(program: PyroLoRA, names: Iterable[str]) -> float:
    """The part of the model that runs before the first random layer, which vectorised draws share.

    Args:
        program: The Pyro model.
        names: The random sites.

    Returns:
        A number in [0, 1]: the fraction of the base model's linear maps that are registered earlier.
    """
    random = {path for name in names if name in program.sites for path, _ in program.sites[name].holders}
    linear = [path for path, module in program.model.named_modules() if getattr(module, "weight", None) is not None]
    before = next((i for i, path in enumerate(linear) if path in random), len(linear))
    return before / max(len(linear), 1)


def log_probabilities(program: PyroLoRA) -> Function:
    """``log softmax f(x; θ)`` over the likelihood's classes, ``(b, K)``."""

    def function(draws: Draws, batch: Mapping[str, Tensor]) -> Tensor:
        logits = program.logits(draws, batch)
        return program.likelihood.log_probabilities(logits, likelihood_parameters(program, draws), batch)

    return function


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with NaN or infinity in them."""
    return [name for name, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()]


def _few(things: Sequence[Any]) -> str:
    return ", ".join(map(str, things[:8])) + (f", ... ({len(things)} in all)" if len(things) > 8 else "")


def log_likelihood(program: PyroLoRA) -> Function:
    """``log p(y_n | x_n, θ)``, ``(b,)``."""

    def function(draws: Draws, batch: Mapping[str, Tensor]) -> Tensor:
        logits = program.logits(draws, batch)
        return program.likelihood.log_prob(logits, likelihood_parameters(program, draws), batch)

    return function


def likelihood_parameters(program: PyroLoRA, draws: Draws) -> dict[str, Tensor]:
    """The likelihood's own parameters among the sites of a draw."""
    return {name: value for name, value in draws.items() if name not in program.sites}


def check_data(data: Dataset) -> None:
    """Raises TypeError for what is no data set, and ValueError for one without rows."""
    if not isinstance(data, Dataset):
        raise TypeError(
            f"data is a {type(data).__name__}, not a tokenised datasets.Dataset: use a split of the task, or "
            "task.tokenise(...) for new rows"
        )
    if len(data) == 0:
        raise ValueError("the data set is empty")


def _by_length(data: Dataset) -> list[int]:
    """Rows from long to short: little padding, and a batch that does not fit in memory fails at once."""
    if "input_ids" not in data.column_names:
        return list(range(len(data)))
    lengths: list[Any] = [
        len(ids) if ids and not isinstance(ids[0], list) else sum(map(len, ids)) for ids in data["input_ids"]
    ]
    return sorted(range(len(data)), key=lambda i: -lengths[i])

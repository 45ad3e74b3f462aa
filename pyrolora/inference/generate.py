"""Generates text from a weight posterior: token by token from the mixture of its draws, or one text a draw."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from pyrolora.inference.generation import GeneratedText, Generation
from pyrolora.inference.posterior import Posterior
from pyrolora.program import PyroLoRA, evaluating
from pyrolora.tasks.text import TextTask

How = Literal["mixture", "draws"]
Weights = Literal["predictive", "uniform"]


@torch.no_grad()
def generate(
    posterior: Posterior,
    prompts: str | Sequence[str],
    *,
    num_draws: int = 8,
    max_new_tokens: int = 40,
    how: How = "mixture",
    weights: Weights = "predictive",
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
) -> Generation:
    """Continues prompts with a causal language model under its weight posterior.

    ``how="mixture"`` samples one text from the posterior predictive, token by token:
    ``p(w_t | w_<t) = Σ_s π_s(t) p(w_t | w_<t, θ_s)``. With ``weights="predictive"``,
    ``π_s(t) ∝ Π_{u<t} p(w_u | w_<u, θ_s)`` over the generated tokens: the probability of the whole text is then
    ``1/S Σ_s Π_t p(w_t | w_<t, θ_s)``, that of one coherent draw whose number nobody knows. The draws that would not
    have written the text so far fade (`GeneratedText.effective_draws`), and so does the mutual information: what is
    left of it is news. ``weights="uniform"`` keeps ``π_s = 1/S``: an ensemble voting on each token afresh, whose doubt
    about late tokens does not shrink, but whose texts are those of no single model.

    ``how="draws"`` writes one text with each draw. Its numbers are of that draw alone, without mutual information; the
    epistemic part is how far the texts differ, `Generation.disagreement`. All draws and prompts see the same random
    numbers (Gumbel noise on the logits), so that equal draws write equal texts, and the text of a prompt depends on
    it and the seed alone.

    Draws stand on the model one after another, each with its own KV cache.

    Args:
        posterior: Over a causal language model, with its task for the tokenizer.
        prompts: One or more.
        num_draws: S; 0 uses the posterior's mean weights. A point estimate runs once.
        max_new_tokens: A text ends there, or at the end-of-text token.
        how: One text of all draws, or one of each.
        weights: Of the draws, in a mixture.
        temperature: Of sampling, from ``p(w_t | w_<t)^{1/τ}`` normalised; 0 takes the most probable token.
        seed: Of the draws and of sampling.
        batch_size: Prompts at once.

    Raises:
        ValueError: A model that generates no text, a guide whose predictions are no draws of the weights, no prompt or
            an empty one, a text longer than the model's positions.
    """
    _check(posterior, how, weights, temperature, max_new_tokens)
    program, tokenizer = posterior.program, _tokenizer(posterior)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    ids = _encode(prompts, program, tokenizer, max_new_tokens)
    draws = _draws(posterior, num_draws, seed)
    groups = [draws] if how == "mixture" else [[draw] for draw in draws]
    sampling = _Sampling(max_new_tokens, temperature, weights == "predictive", seed, _stops(program, tokenizer))
    texts: list[tuple[GeneratedText, ...]] = []
    with evaluating(program.model):
        for start in tqdm(range(0, len(ids), batch_size), desc="generate", delay=3, leave=False):
            given, mask = _padded(ids[start : start + batch_size], program.device)
            written = [_write([_Reader(program, draw) for draw in group], given, mask, sampling) for group in groups]
            for i in range(len(given)):
                rows = [{name: values[i] for name, values in columns.items()} for columns in written]
                texts.append(tuple(_text(prompts[start + i], ids[start + i], row, tokenizer) for row in rows))
    return Generation(tuple(texts), how=how, weights=weights, num_draws=len(draws))


@dataclass(frozen=True)
class _Sampling:
    """How texts are written."""

    max_new_tokens: int
    temperature: float
    predictive: bool
    seed: int
    stops: tuple[int, ...]


class _Reader:
    """One draw reading a batch of texts as they grow, with its KV cache."""

    def __init__(self, program: PyroLoRA, draw: Mapping[str, Tensor]):
        self._program, self._draw = program, draw
        known = inspect.signature(program.model.get_base_model().forward).parameters
        self._last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._positions = "position_ids" in known
        self._cache: Any = None

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """``log p(· | text so far)``, ``(b, V)``, from the tokens that are new, ``(b, t)``, and the mask of all."""
        inputs = {"input_ids": tokens, "attention_mask": mask, **self._last}
        if self._positions:
            # Counted from each text's first real token, as in training.
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        with self._program.placed(self._draw):
            output = self._program.model(**inputs, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        return output.logits[:, -1].float().log_softmax(-1)


def _padded(ids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask, ``(b, t)``, padded on the left: what is new stands last in every row."""
    rows = [torch.tensor(row, device=device) for row in ids]
    ones = [torch.ones_like(row) for row in rows]
    tokens, mask = (pad_sequence(part, batch_first=True, padding_side="left") for part in (rows, ones))
    return tokens, mask


def _write(readers: Sequence[_Reader], tokens: Tensor, mask: Tensor, sampling: _Sampling) -> dict[str, list[Tensor]]:
    """Continues left-padded prompts ``(b, t)``; for each prompt the columns of its `GeneratedText`."""
    generator = torch.Generator().manual_seed(sampling.seed)
    size, device = len(tokens), tokens.device
    log_weights = torch.full((len(readers), size), -math.log(len(readers)), device=device)
    stops = torch.tensor(sampling.stops, device=device, dtype=torch.long)
    running = torch.ones(size, dtype=torch.bool, device=device)
    columns: dict[str, list[Tensor]] = {}
    while running.any() and len(columns.get("running", ())) < sampling.max_new_tokens:
        log_p = torch.stack([reader(tokens, mask) for reader in readers])
        log_mixture = (log_p + log_weights.unsqueeze(-1)).logsumexp(0)
        score = log_mixture
        if sampling.temperature > 0:
            gumbel = -torch.empty(score.shape[-1]).exponential_(generator=generator).log()
            score = log_mixture + sampling.temperature * gumbel.to(device)
        chosen = score.argmax(-1, keepdim=True)
        step = {
            "running": running,
            "tokens": chosen.squeeze(-1),
            "log_prob": log_mixture.gather(-1, chosen).squeeze(-1),
            "entropy": _entropy(log_mixture),
            "expected_entropy": (log_weights.exp() * _entropy(log_p)).sum(0),
            "effective_draws": 1 / log_weights.exp().square().sum(0),
        }
        for name, value in step.items():
            columns.setdefault(name, []).append(value)
        if sampling.predictive:
            own = log_p.gather(-1, chosen.expand(len(readers), -1, -1)).squeeze(-1)
            log_weights = (log_weights + own).log_softmax(0)
        running = running & ~torch.isin(chosen.squeeze(-1), stops)
        # Texts that have ended are carried along; nothing after their end is kept.
        tokens, mask = chosen, torch.cat([mask, torch.ones_like(chosen)], -1)
    stacked = {name: torch.stack(values, -1).cpu() for name, values in columns.items()}
    alive = stacked.pop("running")
    return {name: [row[keep] for row, keep in zip(rows, alive, strict=True)] for name, rows in stacked.items()}


def _entropy(log_p: Tensor) -> Tensor:
    return torch.special.entr(log_p.exp()).sum(-1)


def _draws(posterior: Posterior, num_draws: int, seed: int) -> list[dict[str, Tensor]]:
    """The draws of the adapters, one after another; one for mean weights and point estimates."""
    program, guide = posterior.program, posterior.guide
    if num_draws < 0:
        raise ValueError(f"num_draws is at least 0, not {num_draws}")
    if num_draws > 0 and guide.natural_parameters(program, num_draws, seed=seed) is not None:
        raise ValueError(
            f"{type(guide).__name__} predicts by other means than draws of the weights (linearised, or with noise of "
            "each pass), which write no coherent text; generate with its mean weights (draws: 0), or fit another guide"
        )
    if num_draws == 0 or not guide.random_sites():
        return [{name: value for name, value in posterior.mean().items() if name in program.sites}]
    values = {n: v for n, v in posterior.draw(guide.draws_for(num_draws), seed=seed).items() if n in program.sites}
    return [{name: value[s] for name, value in values.items()} for s in range(len(next(iter(values.values()))))]


def _check(posterior: Posterior, how: str, weights: str, temperature: float, max_new_tokens: int) -> None:
    for name, value, choices in (("how", how, get_args(How)), ("weights", weights, get_args(Weights))):
        if value not in choices:
            raise ValueError(f"{name} is one of {', '.join(choices)}, not {value!r}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is a number ≥ 0, not {temperature}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is at least 1, not {max_new_tokens}")
    base: Any = posterior.program.model.get_base_model()
    writes = hasattr(base, "can_generate") and base.can_generate() and not base.config.is_encoder_decoder
    if not writes or "past_key_values" not in inspect.signature(base.forward).parameters:
        raise ValueError(
            f"{type(base).__name__} generates no text: that takes a causal language model with a KV cache, as the "
            "tasks LanguageModeling and AnswerTokenChoice load it"
        )


def _tokenizer(posterior: Posterior) -> PreTrainedTokenizerBase:
    task = posterior.program.task
    if not isinstance(task, TextTask):
        raise ValueError("generation needs the program's task for its tokenizer: PyroLoRA(..., task=task)")
    return task.tokenizer


def _encode(
    prompts: Sequence[str], program: PyroLoRA, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> list[list[int]]:
    """Token ids with what the tokenizer puts before a text, without what it puts after one: the text goes on."""
    base: Any = program.model.get_base_model()
    most = getattr(base.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if not prompts:
        raise ValueError("no prompt to continue")
    rows = []
    for i, prompt in enumerate(prompts):
        bare = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        if not bare:
            raise ValueError(f"prompt {i} is empty")
        whole = tokenizer(prompt, verbose=False)["input_ids"]
        starts = (k for k in range(len(whole)) if whole[k : k + len(bare)] == bare)
        rows.append(whole[: next(starts, len(whole)) + len(bare)])
        if len(rows[-1]) + max_new_tokens > most:
            raise ValueError(
                f"prompt {i} has {len(rows[-1])} tokens; with {max_new_tokens} new ones that is more than the model's "
                f"{most} positions. Shorten it, or lower max_new_tokens"
            )
    return rows


def _stops(program: PyroLoRA, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a text, for the model's own ``generate`` or for its tokenizer."""
    base: Any = program.model.get_base_model()
    configured = getattr(base.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({token for token in (*several, tokenizer.eos_token_id) if token is not None}))


def _text(
    prompt: str, ids: list[int], columns: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> GeneratedText:
    """One text and its pieces, decoded behind the prompt: tokenizers drop the white space before a text's start."""
    tokens = columns["tokens"].tolist()
    before: Any = tokenizer.decode(ids, skip_special_tokens=True)
    full: Any = tokenizer.decode([*ids, *tokens], skip_special_tokens=True)
    # Cleaning up may have changed white space where the two meet.
    offset = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, full, strict=False)))
    ends = [0]
    for t in range(1, len(tokens)):
        so_far: Any = tokenizer.decode([*ids, *tokens[:t]], skip_special_tokens=True)
        # A character whose last bytes are still to come is decoded as U+FFFD.
        end = len(so_far.rstrip("\ufffd")) - offset
        ends.append(min(max(end, ends[-1]), len(full) - offset))
    ends.append(len(full) - offset)
    text = full[offset:]
    pieces = tuple(text[a:b] for a, b in pairwise(ends))
    return GeneratedText(prompt=prompt, text=text, pieces=pieces, **columns)

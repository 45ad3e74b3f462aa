"""Generates text from a weight posterior: token by token from the mixture of its draws, or one text a draw."""

from __future__ import annotations

import inspect
import logging
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

from pyrolora.adapters.shards import is_sharded
from pyrolora.adapters.sites import AdapterError
from pyrolora.inference.generation import GeneratedText, Generation
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.reading import Reader
from pyrolora.program import PyroLoRA, evaluating
from pyrolora.tasks.chat import Chat
from pyrolora.tasks.text import TextTask

logger = logging.getLogger("pyrolora")

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
    chat: bool | Mapping[str, Any] = False,
    batch_size: int = 8,
    chunk_size: int = 8,
) -> Generation:
    """Continues prompts with a causal language model under its weight posterior.

    ``how="mixture"`` samples one text from the posterior predictive, token by token:
    ``p(w_t | w_<t) = Σ_s π_s(t) p(w_t | w_<t, θ_s)``. With ``weights="predictive"``,
    ``π_s(t) ∝ Π_{u<t} p(w_u | w_<u, θ_s)`` over the generated tokens: the probability of the whole text is then
    ``1/S Σ_s Π_t p(w_t | w_<t, θ_s)``, that of one coherent draw whose number nobody knows. The draws that would not
    have written the text so far fade (`GeneratedText.effective_draws`), and so does the mutual information.
    ``weights="uniform"`` keeps ``π_s = 1/S``: an ensemble voting on each token afresh, whose doubt about late tokens
    does not shrink, but whose texts are those of no single model.

    ``how="draws"`` writes one text with each draw. Its numbers are of that draw alone, without mutual information; the
    epistemic part is how far the texts differ, `Generation.disagreement`. All draws and prompts see the same random
    numbers (Gumbel noise on the logits): equal draws write equal texts, and a prompt's text depends on the seed alone.

    Args:
        posterior: Over a causal language model, with its task for the tokenizer.
        prompts: One or more.
        num_draws: S; 0 uses the posterior's mean weights. A point estimate runs once.
        max_new_tokens: A text ends there, or at the end-of-text token.
        how: One text of all draws, or one of each.
        weights: Of the draws, in a mixture.
        temperature: Of sampling, from ``p(w_t | w_<t)^{1/τ}`` normalised; 0 takes the most probable token.
        seed: Of the draws and of sampling.
        chat: Make each prompt the user's turn of the tokenizer's chat template; the text is the reply. A mapping is
            passed to the template: ``{"enable_thinking": False}``.
        batch_size: Prompts at once.
        chunk_size: Draws that share a pass for each token, with ``batch_size`` rows each; bounds memory. Adapted
            embeddings and expert parameters, adapted maps to which tokens are routed or that see them flattened,
            trained heads with a bias and sharded bases run draw by draw, as with 1; the numbers are the same.

    Raises:
        ValueError: A model that generates no text, a guide whose predictions are no draws of the weights, no prompt or
            an empty one, a text longer than the model's positions, ``chat`` without a chat template.
    """
    _check(posterior, how, weights, temperature, {"max_new_tokens": max_new_tokens, "chunk_size": chunk_size})
    program, tokenizer = posterior.program, _tokenizer(posterior)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    ids = _encode(prompts, program, tokenizer, max_new_tokens, chat)
    draws = _draws(posterior, num_draws, seed)
    sampling = _Sampling(max_new_tokens, temperature, how, weights == "predictive", seed, _stops(program, tokenizer))
    writer = _Writer(program, draws, sampling, chunk_size)
    texts: list[tuple[GeneratedText, ...]] = []
    for start in tqdm(range(0, len(ids), batch_size), desc="generate", delay=3, leave=False):
        for i, rows in enumerate(writer(ids[start : start + batch_size]), start):
            texts.append(tuple(_text(prompts[i], ids[i], row, tokenizer) for row in rows))
    return Generation(tuple(texts), how=how, weights=weights, num_draws=_size(draws))


@dataclass(frozen=True)
class _Sampling:
    """How texts are written."""

    max_new_tokens: int
    temperature: float
    how: str
    predictive: bool
    seed: int
    stops: tuple[int, ...]


def _padded(ids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask, ``(b, t)``, padded on the left: what is new stands last in every row."""
    rows = [torch.tensor(row, device=device) for row in ids]
    ones = [torch.ones_like(row) for row in rows]
    tokens, mask = (pad_sequence(part, batch_first=True, padding_side="left") for part in (rows, ones))
    return tokens, mask


class _Writer:
    """Continues batches of prompts under all draws, in chunks of draws that share a pass while the model bears it."""

    def __init__(self, program: PyroLoRA, draws: Mapping[str, Tensor], sampling: _Sampling, chunk_size: int):
        self._program, self._draws, self._sampling = program, draws, sampling
        self._chunk = 1 if is_sharded(program.model) else chunk_size

    def __call__(self, ids: Sequence[Sequence[int]]) -> list[list[dict[str, Tensor]]]:
        """For each prompt its texts, as columns of `GeneratedText`."""
        given = _padded(ids, self._program.device)
        with evaluating(self._program.model):
            try:
                return self._written(*given)
            except AdapterError as error:
                if self._chunk == 1:
                    raise
                logger.info("draws cannot share a pass of this model; running them one by one (%s)", error)
                self._chunk = 1
                return self._written(*given)

    def _written(self, tokens: Tensor, mask: Tensor) -> list[list[dict[str, Tensor]]]:
        chunks = (slice(first, first + self._chunk) for first in range(0, _size(self._draws), self._chunk))
        parts = ({name: value[chunk] for name, value in self._draws.items()} for chunk in chunks)
        readers = (Reader(self._program, part, len(tokens)) for part in parts)
        if self._sampling.how == "mixture":
            return _write(list(readers), tokens, mask, self._sampling)
        each = [_write([reader], tokens, mask, self._sampling) for reader in readers]
        return [[text for texts in own for text in texts] for own in zip(*each, strict=True)]


def _write(
    readers: Sequence[Reader], tokens: Tensor, mask: Tensor, sampling: _Sampling
) -> list[list[dict[str, Tensor]]]:
    """Continues left-padded prompts ``(b, t)`` with G texts each: one of all M draws, or one of each."""
    generator = torch.Generator().manual_seed(sampling.seed)
    draws, size, device = sum(reader.size for reader in readers), len(tokens), tokens.device
    members, texts = (draws, 1) if sampling.how == "mixture" else (1, draws)
    log_weights = torch.full((members, texts, size), -math.log(members), device=device)
    stops = torch.tensor(sampling.stops, device=device, dtype=torch.long)
    running = torch.ones(texts, size, dtype=torch.bool, device=device)
    columns: dict[str, list[Tensor]] = {}
    tokens = tokens.unsqueeze(0)
    while running.any() and len(columns.get("running", ())) < sampling.max_new_tokens:
        log_p = torch.cat([reader(tokens, mask) for reader in readers]).view(members, texts, size, -1)
        log_mixture = (log_p + log_weights.unsqueeze(-1)).logsumexp(0)
        score = log_mixture
        if sampling.temperature > 0:
            gumbel = -torch.empty(score.shape[-1]).exponential_(generator=generator).log()
            score = log_mixture + sampling.temperature * gumbel.to(device)
        tokens = score.argmax(-1, keepdim=True)
        chosen = tokens.squeeze(-1)
        step = {
            "running": running,
            "tokens": chosen,
            "log_prob": log_mixture.gather(-1, tokens).squeeze(-1),
            "entropy": _entropy(log_mixture),
            "expected_entropy": (log_weights.exp() * _entropy(log_p)).sum(0),
            "effective_draws": 1 / log_weights.exp().square().sum(0),
        }
        for name, value in step.items():
            columns.setdefault(name, []).append(value)
        if sampling.predictive:
            own = log_p.gather(-1, tokens.expand(members, -1, -1, -1)).squeeze(-1)
            log_weights = (log_weights + own).log_softmax(0)
        running = running & ~torch.isin(chosen, stops)
        # Texts that have ended are carried along; nothing after their end is kept.
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
    stacked = {name: torch.stack(values, -1).cpu() for name, values in columns.items()}
    alive = stacked.pop("running")
    return [
        [{name: rows[g, n][alive[g, n]] for name, rows in stacked.items()} for g in range(texts)] for n in range(size)
    ]


def _entropy(log_p: Tensor) -> Tensor:
    return torch.special.entr(log_p.exp()).sum(-1)


def _draws(posterior: Posterior, num_draws: int, seed: int) -> dict[str, Tensor]:
    """The draws of the adapters, ``{site: (S, *shape)}``; S is 1 for mean weights and point estimates."""
    program, guide = posterior.program, posterior.guide
    if num_draws < 0:
        raise ValueError(f"num_draws is at least 0, not {num_draws}")
    if num_draws > 0 and guide.natural_parameters(program, num_draws, seed=seed) is not None:
        raise ValueError(
            f"{type(guide).__name__} predicts by other means than draws of the weights (linearised, or with noise of "
            "each pass), which write no coherent text; generate with its mean weights (draws: 0), or fit another guide"
        )
    if num_draws == 0 or not guide.random_sites():
        values = {name: value.unsqueeze(0) for name, value in posterior.mean().items()}
    else:
        values = posterior.draw(guide.draws_for(num_draws), seed=seed)
    return {name: value for name, value in values.items() if name in program.sites}


def _size(draws: Mapping[str, Tensor]) -> int:
    return len(next(iter(draws.values())))


def _check(posterior: Posterior, how: str, weights: str, temperature: float, counts: Mapping[str, int]) -> None:
    for name, chosen, choices in (("how", how, get_args(How)), ("weights", weights, get_args(Weights))):
        if chosen not in choices:
            raise ValueError(f"{name} is one of {', '.join(choices)}, not {chosen!r}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is a number ≥ 0, not {temperature}")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is at least 1, not {value}")
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
    prompts: Sequence[str],
    program: PyroLoRA,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    chat: bool | Mapping[str, Any],
) -> list[list[int]]:
    """Token ids with what the tokenizer or its chat template puts before a text, without what it puts after one."""
    base: Any = program.model.get_base_model()
    most = getattr(base.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if not prompts:
        raise ValueError("no prompt to continue")
    turns = None if chat is False else Chat(tokenizer, chat if isinstance(chat, Mapping) else {})
    rows = []
    for i, prompt in enumerate(prompts):
        bare = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        if not bare:
            raise ValueError(f"prompt {i} is empty")
        if turns is None:
            whole = tokenizer(prompt, verbose=False)["input_ids"]
            starts = (k for k in range(len(whole)) if whole[k : k + len(bare)] == bare)
            rows.append(whole[: next(starts, len(whole)) + len(bare)])
        else:
            rows += turns.tokens([prompt])[0]["input_ids"]
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

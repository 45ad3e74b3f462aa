"""Prompts for models tuned to chat: the user's turn of the tokenizer's own template, and the reply's first token."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase


class Chat:
    """A tokenizer's chat template with one turn of the user, up to where the reply begins.

    Args:
        tokenizer: One with a chat template.
        options: What the template understands beside the messages, such as ``{"enable_thinking": False}``.
        max_length: The most tokens of a turn; without it turns are never cut.

    Raises:
        ValueError: No chat template, or one that alone has ``max_length`` tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], *, max_length: int = sys.maxsize
    ):
        if not tokenizer.chat_template:
            raise ValueError(
                f"chat: the tokenizer ({type(tokenizer).__name__}) has no chat template, as those of models have that "
                "are not tuned to chat. Leave chat out, or set tokenizer.chat_template."
            )
        self._tokenizer, self._options, self._max_length = tokenizer, dict(options), max_length
        # What precedes the prompt is what two different prompts have in common.
        bare, other = (self._ids(self.turn(text)) for text in ("0", "?"))
        self._start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(bare, other, strict=False)))
        if len(bare) > max_length:
            raise ValueError(f"chat: the template alone has {len(bare)} tokens; max_length={max_length} is too small.")

    def turn(self, prompt: str) -> str:
        """The conversation up to where the reply begins."""
        return self._rendered([{"role": "user", "content": prompt}], add_generation_prompt=True)

    def tokens(self, prompts: Sequence[str]) -> tuple[dict[str, list[Any]], list[int]]:
        """Model inputs, and which prompts were cut: too long ones lose their beginning, never the template's."""
        ids, cut = [self._ids(self.turn(prompt)) for prompt in prompts], []
        for i, own in enumerate(ids):
            if (excess := len(own) - self._max_length) > 0:
                del own[self._start : self._start + excess]
                cut.append(i)
        return {"input_ids": ids, "attention_mask": [[1] * len(own) for own in ids]}, cut

    def answer_tokens(self, prompt: str, answers: Sequence[str]) -> list[int]:
        """The token with which the template begins each reply that is an answer.

        Raises:
            ValueError: A reply does not begin with its answer as one token of its own; shows the tokens.
        """
        start, show = self._ids(self.turn(prompt)), self._tokenizer.convert_ids_to_tokens
        added, bad = {}, []
        for answer in answers:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            whole = self._ids(self._rendered(turns))
            added[answer] = whole[len(start) :]
            follows = whole[: len(start)] == start and bool(added[answer])
            if not follows or str(self._tokenizer.decode(added[answer][:1])).strip() != answer:
                bad.append(repr(answer))
        if bad or len({ids[0] for ids in added.values()}) < len(answers):
            shown = ", ".join(f"{answer!r} → {show(ids[:4])}" for answer, ids in added.items())
            raise ValueError(
                f"chat: each reply must begin with an answer that is one token of its own; {', '.join(bad) or 'two'} "
                f"do not: {shown}. Choose other answers, or give the template's options: "
                "chat={'enable_thinking': False} where replies begin with thoughts."
            )
        return [ids[0] for ids in added.values()]

    def _rendered(self, turns: list[dict[str, str]], **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False, **options, **self._options))

    def _ids(self, text: str) -> list[int]:
        # The template has written the special tokens itself.
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

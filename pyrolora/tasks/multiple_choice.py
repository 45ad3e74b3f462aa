"""Questions with choices: scored by an encoder, or answered with one token by a causal language model."""

from __future__ import annotations

import copy
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMultipleChoice, PreTrainedTokenizerBase

from pyrolora.likelihoods.answer_tokens import AnswerTokens
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.tasks.chat import Chat
from pyrolora.tasks.data import DataError, Problem, Source, Table, missing, text_problems
from pyrolora.tasks.text import MODEL_INPUTS, TextTask

LETTERS = tuple(string.ascii_uppercase)


class MultipleChoice(TextTask):
    """What the two kinds of multiple choice share: a question, its choices, perhaps a passage, and the right one.

    A label is the index of the right choice or its name: "A", "B", ..., or what the row itself calls it.
    """

    question: str
    choices: str | Sequence[str] | None
    label: str
    passage: str | None
    choice_names: str | Sequence[str] | None

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The question, and the passage where there is one."""
        return (self.question,) if self.passage is None else (self.passage, self.question)

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """What the choices are called, in order."""

    def content_problems(self, table: Table) -> Iterable[Problem]:
        """Rows whose question, passage or choices are missing, empty, or not text."""
        for name in self.text_columns:
            yield from text_problems(name, table.column(name))
        if self.choices is None:
            return
        lists = self.choices_of({name: table.column(name) for name in self.choice_columns})
        shown = ", ".join(self.choice_columns)
        for row, choices in enumerate(lists):
            if not isinstance(choices, (list, tuple)) or len(choices) < 2:
                yield row, f"'{shown}' is {choices!r}, not a list of at least two texts"
            else:
                yield from ((row, reason) for _, reason in text_problems(shown, choices))
        yield from self.number_problems([len(c) if isinstance(c, (list, tuple)) else 0 for c in lists])

    @property
    def choice_columns(self) -> tuple[str, ...]:
        """The column of the lists of choices, or the columns of one choice each."""
        if self.choices is None:
            return ()
        return (self.choices,) if isinstance(self.choices, str) else tuple(self.choices)

    def choices_of(self, rows: Mapping[str, list[Any]]) -> Sequence[Any]:
        """Each row's choices, from one column of lists or from several columns."""
        if isinstance(self.choices, str):
            return rows[self.choices]
        return [list(row) for row in zip(*(rows[name] for name in self.choice_columns), strict=True)]

    def own_names(self, rows: Mapping[str, list[Any]], size: int) -> Sequence[Any]:
        """What each of ``size`` rows calls its choices: its own names where there are some, else the task's."""
        if isinstance(self.choice_names, str):
            return rows.get(self.choice_names, [self.names] * size)
        return [self.choice_names or self.names] * size

    @abstractmethod
    def number_problems(self, numbers: list[int]) -> Iterable[Problem]:
        """Rows with a number of choices that cannot be used; 0 stands for no list at all, which is reported already."""

    def label_problems(self, table: Table) -> Iterable[Problem]:
        """Rows whose label is missing or is none of the row's own choices."""
        labels = table.column(self.label)
        needed = [*self.choice_columns, *([self.choice_names] if isinstance(self.choice_names, str) else [])]
        columns = {name: table.column(name) for name in needed}
        lists: Sequence[Any] = [self.names] * len(labels) if self.choices is None else self.choices_of(columns)
        own = self.own_names(columns, len(labels))
        for row, (label, choices, names) in enumerate(zip(labels, lists, own, strict=True)):
            if missing(label):
                yield row, f"no '{self.label}'"
            elif not 0 <= self.index(label, names) < len(choices):
                yield row, f"'{self.label}' {label!r} is none of the {len(choices)} choices (0 to {len(choices) - 1})"

    def index(self, label: Any, names: Sequence[str] | None) -> int:
        """The index of a choice by its index, or by its name among these; −1 where it is neither."""
        if isinstance(label, str):
            return list(names).index(label) if names and label in names else -1
        if isinstance(label, (int, float)) and label == label and label == int(label):
            return int(label) if label >= 0 else -1
        return -1

    def labels(self, rows: Mapping[str, list[Any]]) -> list[int]:
        """The labels of a batch of rows as indices, −1 where there is none."""
        size = len(rows[self.question])
        given = rows.get(self.label, [None] * size)
        found = [self.index(label, names) for label, names in zip(given, self.own_names(rows, size), strict=True)]
        return [index if index < len(self.names) else -1 for index in found]

    def listed(self, rows: Mapping[str, list[Any]]) -> list[list[str]]:
        """The lines that a person would read of each row: passage, question, named choices."""
        texts = []
        choices = None if self.choices is None else self.choices_of(rows)
        for i, question in enumerate(rows[self.question]):
            lines = [question] if self.passage is None else [rows[self.passage][i], question]
            if choices is not None:
                lines += [f"{name}. {choice}" for name, choice in zip(self.names, choices[i], strict=False)]
            texts.append(lines)
        return texts


class CandidateChoice(MultipleChoice):
    """Each choice read with its question and given one score: for encoders with a multiple-choice head.

    ``p(y = k) = softmax_k f(question, choice_k)``. A candidate is the pair (question, choice), or (passage, question
    and choice). Shapes: inputs (b, K, T), logits (b, K).

    Args:
        tokenizer: the base model's tokenizer; it must have a padding token.
        train: the training split: a hub name, a local file, a ``DataSource`` or a ``datasets.Dataset``.
        validation: the validation split.
        test: the test split.
        ood: named out-of-distribution splits, with as many choices.
        question: the column of the question.
        choices: the column of the choices, a list of texts, or the columns of one choice each; every row must have
            equally many.
        label: the column of the right choice.
        passage: the column of a text that the question is about.
        choice_names: the column of what each row calls its choices, where labels are such names and no letters; or
            these names themselves, where all rows have the same: ``("1", "2")``.
        max_length: the most tokens that a candidate may have; longer ones are cut, and their rows counted.
        max_train: train on this many rows only, drawn at random.
        validation_fraction: carve this fraction off train at random for validation, before ``max_train`` applies.
        data_seed: the seed of both random choices.

    Raises:
        DataError: a split cannot be read, is empty, or has rows that cannot be used.
    """

    auto_class: ClassVar[Any] = AutoModelForMultipleChoice

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train: Source,
        validation: Source | None = None,
        test: Source | None = None,
        ood: Mapping[str, Source] | None = None,
        question: str = "question",
        choices: str | Sequence[str] = "choices",
        label: str = "label",
        passage: str | None = None,
        choice_names: str | Sequence[str] | None = None,
        max_length: int = 128,
        max_train: int | None = None,
        validation_fraction: float | None = None,
        data_seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length)
        self.question, self.choices, self.label, self.passage = question, choices, label, passage
        self.choice_names = choice_names
        self.num_choices: int | None = None
        self.read_splits(
            train,
            validation=validation,
            test=test,
            ood=ood,
            max_train=max_train,
            validation_fraction=validation_fraction,
            data_seed=data_seed,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """A, B, ... for each of the K choices."""
        return LETTERS[: self.num_choices]

    def learn(self, table: Table) -> None:
        """Fix the number of choices and the likelihood."""
        self.num_choices = len(self.choices_of({name: table.column(name)[:1] for name in self.choice_columns})[0])
        if self.num_choices > len(LETTERS):
            raise DataError(f"{table.origin}: {self.num_choices} choices; at most {len(LETTERS)} can be named.")
        self.class_names = self.names
        self.likelihood = Categorical(self.num_choices)

    def number_problems(self, numbers: list[int]) -> Iterable[Problem]:
        """Rows with another number of choices than the training split has (there: than most rows have)."""
        common = Counter(number for number in numbers if number).most_common(1)
        expected = self.num_choices or (common[0][0] if common else 0)
        for row, number in enumerate(numbers):
            if number not in (0, expected):
                yield row, f"{number} choices where {expected} are needed; leave such rows out (dataset.filter)"

    def encode(self, rows: Mapping[str, list[Any]]) -> tuple[dict[str, list[Any]], int]:
        """Tokenise K candidates for each row; a row counts as cut when any of its candidates was."""
        first, second = [], []
        for i, choices in enumerate(self.choices_of(rows)):
            question = rows[self.question][i]
            for choice in choices:
                first.append(question if self.passage is None else rows[self.passage][i])
                second.append(choice if self.passage is None else f"{question} {choice}")
        flat, cut = self.tokens(self.tokenizer, first, second)
        k = len(self.names)
        columns: dict[str, list[Any]] = {}
        for key, values in flat.items():
            columns[key] = [values[i : i + k] for i in range(0, len(values), k)]
        columns["text"] = ["\n".join(lines) for lines in self.listed(rows)]
        columns["labels"] = self.labels(rows)
        return columns, len({i // k for i in cut})

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch padded to its longest candidate: inputs (b, K, T), labels (b,)."""
        flat = [
            {key: row[key][k] for key in MODEL_INPUTS if key in row} for row in rows for k in range(len(self.names))
        ]
        batch = {key: value.unflatten(0, (len(rows), -1)) for key, value in super().collate(flat).items()}
        if "labels" in rows[0]:
            batch["labels"] = self.label_tensor([row["labels"] for row in rows])
        return batch


class AnswerTokenChoice(MultipleChoice):
    """The choices listed in a prompt that asks for a letter: for causal language models.

    The prompt is ``[passage] Question: ... A. ... B. ... Answer:``, one part a line, and the answer is the next token:
    ``p(y = k)`` is the softmax over the K answer tokens. Without ``choices`` nothing is listed and ``answers`` are the
    answers themselves, as in ``("no", "yes")``.

    Rows may have fewer choices than there are answers; the softmax is over all K answers nevertheless. A prompt that
    is too long loses its *beginning* (the passage), never the choices' end, and is counted.

    With left padding the batch carries ``position_ids``; a model that does not take them (ALiBi models such as BLOOM)
    wants ``tokenizer.padding_side = "right"``.

    Args:
        tokenizer: the base model's tokenizer; it must have a padding token (the end-of-text token may serve: it is
            masked).
        train: the training split: a hub name, a local file, a ``DataSource`` or a ``datasets.Dataset``.
        validation: the validation split.
        test: the test split.
        ood: named out-of-distribution splits, with no more choices.
        question: the column of the question.
        choices: the column of the choices, a list of texts, or the columns of one choice each, such as
            ``("option1", "option2")``; ``None`` where the answers say it all.
        label: the column of the right choice.
        passage: the column of a text that the question is about.
        choice_names: the column of what each row calls its choices, where labels are such names and no letters; or
            these names themselves, where all rows have the same: ``("1", "2")``.
        answers: the K answers, one token each after the prompt; by default A, B, ... as many as train has choices.
        chat: make each prompt the user's turn of the tokenizer's chat template, for models tuned to chat; the answer is
            the first token of the reply. A mapping is passed to the template: ``{"enable_thinking": False}``.
        max_length: the most tokens that a prompt may have.
        max_train: train on this many rows only, drawn at random.
        validation_fraction: carve this fraction off train at random for validation, before ``max_train`` applies.
        data_seed: the seed of both random choices.

    Raises:
        DataError: a split cannot be read, is empty, or has rows that cannot be used.
        ValueError: an answer is not one token after the prompt, two answers are the same token, or ``chat`` for a
            tokenizer without a chat template.
    """

    auto_class: ClassVar[Any] = AutoModelForCausalLM

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train: Source,
        validation: Source | None = None,
        test: Source | None = None,
        ood: Mapping[str, Source] | None = None,
        question: str = "question",
        choices: str | Sequence[str] | None = "choices",
        label: str = "label",
        passage: str | None = None,
        choice_names: str | Sequence[str] | None = None,
        answers: Sequence[str] | None = None,
        chat: bool | Mapping[str, Any] = False,
        max_length: int = 256,
        max_train: int | None = None,
        validation_fraction: float | None = None,
        data_seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length)
        if choices is None and answers is None:
            raise ValueError("without a column of choices say what the answers are, such as answers=('no', 'yes').")
        self.question, self.choices, self.label, self.passage = question, choices, label, passage
        self.choice_names = choice_names
        self.answers = None if answers is None else tuple(answers)
        self._cutting = copy.deepcopy(tokenizer)
        self._cutting.truncation_side = "left"  # "Answer:" must stay
        options = chat if isinstance(chat, Mapping) else {}
        self._chat = None if chat is False else Chat(tokenizer, options, max_length=max_length)
        self.read_splits(
            train,
            validation=validation,
            test=test,
            ood=ood,
            max_train=max_train,
            validation_fraction=validation_fraction,
            data_seed=data_seed,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The answers; before they are known, all letters."""
        return self.answers or LETTERS

    def learn(self, table: Table) -> None:
        """Fix the answers, their tokens and the likelihood."""
        if self.answers is None:
            lists = self.choices_of({name: table.column(name) for name in self.choice_columns})
            self.answers = LETTERS[: max(len(choices) for choices in lists)]
        self.class_names = self.answers
        self.num_labels = len(self.answers)
        columns = [*self.text_columns, *self.choice_columns]
        prompt = self.prompts({name: table.column(name)[:1] for name in columns})[0]
        if self._chat is None:
            tokens = answer_tokens(self.tokenizer, prompt, self.answers)
        else:
            tokens = self._chat.answer_tokens(prompt, self.answers)
        self.likelihood = AnswerTokens(tokens)

    def number_problems(self, numbers: list[int]) -> Iterable[Problem]:
        """Rows with more choices than answers."""
        for row, number in enumerate(numbers):
            if number > len(self.names):
                yield row, f"{number} choices for the {len(self.names)} answers {', '.join(self.names)}"

    def prompts(self, rows: Mapping[str, list[Any]]) -> list[str]:
        """What the model reads, up to where the answer follows."""
        asked = dict(rows)
        asked[self.question] = [f"Question: {question}" for question in rows[self.question]]
        return ["\n".join([*lines, "Answer:"]) for lines in self.listed(asked)]

    def encode(self, rows: Mapping[str, list[Any]]) -> tuple[dict[str, list[Any]], int]:
        """Tokenise prompts; too long ones lose their beginning."""
        prompts = self.prompts(rows)
        columns, cut = self.tokens(self._cutting, prompts) if self._chat is None else self._chat.tokens(prompts)
        columns.pop("token_type_ids", None)  # causal models have one segment
        columns["text"] = prompts
        columns["labels"] = self.labels(rows)
        return columns, len(cut)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of prompts: input_ids, attention_mask (position_ids, if padded on the left) (b, T), labels (b,)."""
        return self.with_positions(super().collate(rows))


def answer_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str]) -> list[int]:
    """The token that each answer adds to the prompt, found by tokenising the prompt with and without it.

    Tokenizers differ in what becomes of " A" after "Answer:" (one token "ĠA", "▁A", or two), so the answer is never
    tokenised on its own.

    Raises:
        ValueError: an answer is not one known token after the prompt, or two answers are the same; shows the tokens.
    """
    start: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    if start[-1:] != tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"][-1:]:
        ending = tokenizer.convert_ids_to_tokens(start[-1])
        raise ValueError(
            f"the tokenizer ends every text with '{ending}', so that no answer can follow a prompt. Switch that off "
            "(tokenizer.add_eos_token = False), or use CandidateChoice with an encoder."
        )
    full = [tokenizer(f"{prompt} {answer}", verbose=False)["input_ids"] for answer in answers]
    added = [ids[len(start) :] if ids[: len(start)] == start else ids[len(start) - 1 :] for ids in full]
    shown = ", ".join(
        f"{answer!r} → {tokenizer.convert_ids_to_tokens(ids)}" for answer, ids in zip(answers, added, strict=True)
    )
    bad = [
        repr(answer)
        for answer, ids, whole in zip(answers, added, full, strict=True)
        if whole[: len(start)] != start or len(ids) != 1 or ids[0] == tokenizer.unk_token_id
    ]
    if bad:
        raise ValueError(
            f"after the prompt's end {prompt[-20:]!r} each answer must be one known token, but {', '.join(bad)} "
            f"is not: {shown}. Choose other answers."
        )
    tokens = [ids[0] for ids in added]
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"two answers are the same token: {shown}. Choose answers that differ in their token.")
    return tokens

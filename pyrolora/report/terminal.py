"""Generated text in a terminal: doubted words on a coloured background, or with a mark behind them in plain text."""

from __future__ import annotations

from collections.abc import Sequence

from pyrolora.inference.generation import GeneratedText

# ANSI: black on yellow, black on red.
_COLOURS = ("\x1b[30;43m", "\x1b[30;41m")
_OFF = "\x1b[0m"
_MARKS = ("[?]", "[??]")


def marked(text: GeneratedText, levels: Sequence[float], *, colour: bool) -> str:
    """The text with its doubted words marked.

    A word is doubted by its mutual information with the weights, in nats: from the first level on ``[?]`` or yellow,
    from the second on ``[??]`` or red.

    Args:
        text: What was generated.
        levels: Two, in nats, the lower one first.
        colour: ANSI colours; otherwise marks behind the words.
    """
    parts, end = [], 0
    for word in text.words():
        reached = sum(word.mutual_information >= level for level in levels)
        parts += [text.text[end : word.start], _shown(text.text[word.start : word.end], reached, colour)]
        end = word.end
    return "".join([*parts, text.text[end:]])


def legend(levels: Sequence[float], *, colour: bool) -> str:
    """What the marks mean, in one line."""
    low, high = (_shown(f"{level:g} nats", i, colour) for i, level in enumerate(levels, 1))
    return f"doubted words, by mutual information with the weights: from {low}, from {high}"


def _shown(word: str, reached: int, colour: bool) -> str:
    if reached == 0:
        return word
    return f"{_COLOURS[reached - 1]}{word}{_OFF}" if colour else f"{word}{_MARKS[reached - 1]}"

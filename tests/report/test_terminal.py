from __future__ import annotations

import torch

from pyrolora.inference.generation import GeneratedText
from pyrolora.report.terminal import legend, marked


def text() -> GeneratedText:
    """ "the stone sinks\\n slowly", with 0, 0.1 + 0.1, 0.5 and 0.05 nats of mutual information."""
    pieces = (" the", " sto", "ne", " sinks", "\n slowly")
    information = torch.tensor([0.0, 0.1, 0.1, 0.5, 0.05])
    return GeneratedText(
        prompt="there",
        text="".join(pieces),
        tokens=torch.arange(5),
        pieces=pieces,
        log_prob=torch.zeros(5),
        entropy=information,
        expected_entropy=torch.zeros(5),
        effective_draws=torch.ones(5),
    )


def test_marks() -> None:
    """Law: words at the first level or above carry one mark, at the second two, others none; white space stays."""
    assert marked(text(), (0.15, 0.5), colour=False) == " the stone[?] sinks[??]\n slowly"
    assert marked(text(), (0.6, 0.9), colour=False) == text().text
    said = legend((0.15, 0.5), colour=False)
    assert "0.15 nats[?]" in said and "0.5 nats[??]" in said


def test_colours() -> None:
    """Law: in colour the words stand unchanged on yellow and red, each switched off behind its word."""
    assert marked(text(), (0.15, 0.5), colour=True) == " the \x1b[30;43mstone\x1b[0m \x1b[30;41msinks\x1b[0m\n slowly"
    assert "\x1b[30;43m0.15 nats\x1b[0m" in legend((0.15, 0.5), colour=True)

"""Findings as text."""

from __future__ import annotations

import json

from pyrolora.diagnostics.verdict import Finding, show


def test_lines() -> None:
    """Law: every finding has its sign, its name and all its words; advice follows an arrow; lines are wrapped."""
    findings = [
        Finding("noise", "fine", "word " * 60),
        Finding("loo", "bad", "k is large", "hold rows out", {"k": 1.0}),
    ]
    lines = show(findings, width=60).splitlines()
    assert lines[0].startswith("ok noise") and lines[-2].startswith(" ! loo") and lines[-1].strip() == "→ hold rows out"
    assert max(map(len, lines)) <= 60
    assert " ".join(lines).count("word") == 60
    assert json.loads(json.dumps(findings[1].to_dict()))["numbers"] == {"k": 1.0}

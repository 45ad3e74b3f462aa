"""Commands: each a function whose signature is its options and whose docstring its help."""

from pyrolora.commands.comparing import compare, report
from pyrolora.commands.estimating import estimate
from pyrolora.commands.fitting import fit, sites
from pyrolora.commands.generating import generate
from pyrolora.commands.judging import diagnose, evaluate
from pyrolora.commands.methods import calibrate, join, methods
from pyrolora.commands.using import export, predict

__all__ = [
    "calibrate",
    "compare",
    "diagnose",
    "estimate",
    "evaluate",
    "export",
    "fit",
    "generate",
    "join",
    "methods",
    "predict",
    "report",
    "sites",
]

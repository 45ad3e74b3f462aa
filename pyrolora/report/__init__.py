"""Results for people: reliability diagrams and the HTML report."""

from pyrolora.report.html import render, write_picture, write_report
from pyrolora.report.plots import reliability_png, reliability_svg

__all__ = ["reliability_png", "reliability_svg", "render", "write_picture", "write_report"]

"""The report in a real browser, where there is one: layout on a phone and a desk, both colour schemes, contrast."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pyrolora.report.html import render
from tests.report.samples import results

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# What the page looks like from inside, told to the frame around it: a window of its own is never as narrow as a phone.
SCRIPT = """
const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
const paper = rgb(getComputedStyle(document.body).backgroundColor);
const probe = document.body.appendChild(document.createElement("span"));
const colour = name => {
  probe.style.color = `var(${name})`;
  return contrast(rgb(getComputedStyle(probe).color), paper);
};
const size = picture => picture.getBoundingClientRect();
const pictures = [...document.querySelectorAll("main svg[role=img]")].filter(picture => size(picture).width);
const lettered = pictures.filter(picture => picture.querySelector("text"));
parent.postMessage(JSON.stringify({
  wide: document.documentElement.scrollWidth, window: innerWidth, paper: light(paper),
  text: ["--ink", "--soft", "--good", "--bad"].map(colour),
  series: ["--baseline", ...[0, 1, 2, 3, 4, 5, 6].map(i => `--series-${i}`)].map(colour),
  letters: lettered.map(picture => 11 * size(picture).width / picture.viewBox.baseVal.width),
  pictures: pictures.map(picture => [size(picture).width, size(picture).height]),
  links: [...document.querySelectorAll("nav a")].map(a => document.querySelector(a.hash)?.tagName),
  reach: [...document.querySelectorAll(".scroll, pre")].map(element => element.tabIndex),
}), "*");
"""
FRAME = """<!DOCTYPE html><script>onmessage = event => document.documentElement.dataset.found = event.data;</script>
<iframe src="page.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>"""


def look(page: str, folder: Path, *, width: int, dark: bool) -> dict[str, Any]:
    """What the browser sees of a page."""
    (folder / "page.html").write_text(page.replace("</body>", f"<script>{SCRIPT}</script></body>"), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=1300,1000", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def report() -> str:
    """A report with long names, as several recipes give."""
    text = json.dumps(results()).replace("MeanField", "minilm-commonsense-inducing: MeanField")
    return render(json.loads(text))


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1100, False)])
def test_it_can_be_read(tmp_path: Path, width: int, dark: bool) -> None:
    """Law: nothing is wider than the window, pictures have a size and letters one can read, text has a contrast of 4.5
    and data of 3 with the paper, links lead to headings, and what scrolls can be reached by keyboard."""
    found = look(report(), tmp_path, width=width, dark=dark)
    assert found["window"] == width and found["wide"] <= width
    assert (found["paper"] < 0.1) == dark
    assert min(found["text"]) >= 4.5 and min(found["series"]) >= 3.0, found
    assert len(found["pictures"]) > 15 and all(wide > 5 and tall > 5 for wide, tall in found["pictures"])
    assert min(found["letters"]) >= 8.5
    assert found["links"] and set(found["links"]) == {"H2"}
    assert found["reach"] and set(found["reach"]) == {0}

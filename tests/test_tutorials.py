"""Every tutorial runs as it stands, and what it shows is the output of one clean run."""

from __future__ import annotations

import ast
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
MAX_BYTES = 200_000
# The home and temporary folders of whoever ran it.
MACHINE = re.compile(r"/(home|root|Users|tmp|var/folders)/")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shorten(notebook: NotebookNode) -> NotebookNode:
    """The notebook with small sizes: the cell tagged `parameters` has them in its metadata, as ``short``."""
    for cell in code_cells(notebook):
        cell.source = cell.metadata.get("short", cell.source)
    return notebook


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def assigned(source: str) -> set[str]:
    """The names that a cell sets."""
    return {
        node.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def kinds(cell: NotebookNode) -> list[str]:
    """What a reader sees below a cell: streams by name, displays by their types."""
    # On some CPUs bitsandbytes says at its import, which is PEFT's, that it has no faster kernel.
    own = [out for out in cell.outputs if "gemm_4bit_forward" not in out.get("text", "")]
    return sorted({out.get("name") or "+".join(sorted(out.get("data", {}))) or "error" for out in own})


def texts(cell: NotebookNode) -> list[str]:
    """Everything below a cell that is text, pictures left out."""
    shown = [value for out in cell.outputs for kind, value in out.get("data", {}).items() if kind.startswith("text/")]
    return shown + [out["text"] for out in cell.outputs if "text" in out]


def test_there_are_tutorials() -> None:
    """Law: the tests below walk something."""
    assert NOTEBOOKS


@pytest.mark.slow
@each
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: away from its folder, at small sizes, it runs to its end, and its cells show what the stored do."""
    # The notebook sees this checkout, one core, no network, and none of the user's own Jupyter or IPython settings.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")  # on a slow machine a bar would reach stderr
    monkeypatch.delenv("MPLBACKEND", raising=False)
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    notebook = shorten(read(shutil.copy(path, tmp_path)))
    stored = [kinds(cell) for cell in code_cells(notebook)]
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert [kinds(cell) for cell in code_cells(notebook)] == stored


@each
def test_its_small_sizes_are_declared(path: Path) -> None:
    """Law: at most one cell has small sizes; it is tagged, and sets what the cell of the full run sets."""
    chosen = [cell for cell in code_cells(read(path)) if "short" in cell.metadata or "parameters" in tags(cell)]
    assert len(chosen) <= 1
    for cell in chosen:
        assert "parameters" in tags(cell)
        assert assigned(cell.source) == assigned(cell.metadata["short"])
        assert "full = True" in cell.source and "full = False" in cell.metadata["short"]


@each
def test_its_outputs_are_of_one_clean_run(path: Path) -> None:
    """Law: cells were run once, in order, without errors or warnings; the file is small and names no machine."""
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not {"error", "stderr"} & {kind for cell in cells for kind in kinds(cell)}
    assert any("image/png" in kind for cell in cells for kind in kinds(cell))
    assert path.stat().st_size < MAX_BYTES
    assert not [text for cell in cells for text in texts(cell) if MACHINE.search(text)]

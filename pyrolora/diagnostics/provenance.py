"""Where results come from: versions, hardware, and the git state of a file."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("pyrolora", "torch", "pyro-ppl", "transformers", "peft", "datasets", "numpy")


def versions() -> dict[str, str]:
    """The installed versions that results depend on, Python's among them."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def hardware() -> str:
    """Machine, cores, threads and accelerator in a line."""
    parts = [platform.machine(), f"{os.cpu_count()} cores, {torch.get_num_threads()} in use", platform.system()]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def git_state(path: Path) -> dict[str, Any] | None:
    """The state of the git repository that a file is in.

    Returns:
        ``commit``: of HEAD; ``file_changed``: whether the file is not what that commit has; ``tree_changed``: whether
        any tracked file is not. None outside a repository, before its first commit, and without git.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(path.resolve().parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    own = git("status", "--porcelain", "--ignored", "--", path.name)
    tree = git("status", "--porcelain", "--untracked-files=no")
    if not commit or own is None or tree is None:
        return None
    return {"commit": commit, "file_changed": bool(own), "tree_changed": bool(tree)}

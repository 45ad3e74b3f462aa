"""Several processes on one fit (``torchrun``, ``accelerate launch``): which of them writes, and their noise.

Two processes, on accelerators or on a CPU alike:

    torchrun --nproc-per-node 2 -m pyrolora.cli fit recipe.yaml
    accelerate launch --multi_gpu --num_processes 2 -m pyrolora.cli fit recipe.yaml

``accelerate launch --cpu --num_processes 2`` starts one process, which is no error of accelerate's: with ``--cpu`` it
leaves the rest to MPI. ``--multi_gpu`` is its name for torchrun, and needs no GPU.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import distributed

from pyrolora.inference.randomness import isolated, spawn

T = TypeVar("T")


def rank() -> int:
    """The number of this process among those that fit together; 0 where it is alone."""
    return distributed.get_rank() if _together() else 0


def count() -> int:
    """How many processes fit together."""
    return distributed.get_world_size() if _together() else 1


def join() -> None:
    """Connects the processes that were launched together, as a fit does of itself; one that is alone goes on."""
    if launched()[1] > 1:
        PartialState(cpu=not torch.accelerator.is_available())


def wait() -> None:
    """Goes on when every process has come here."""
    if _together():
        distributed.barrier()


def gather(own: T) -> list[T]:
    """What each process has, in the order of their numbers."""
    everything: list[T] = [own] * count()
    if _together():
        distributed.all_gather_object(everything, own)
    return everything


def own_noise() -> AbstractContextManager[None]:
    """A block whose random numbers are this process's own; outside of it all processes draw the same ones.

    One seed is drawn from the random state that they share, which checkpoints hold: noise is independent over
    processes, the same in every run of as many, and whatever else is random (points of SGLD, labels of a Fisher
    information) stays the same everywhere. A process that is alone goes on with its own random state.
    """
    if count() == 1:
        return contextlib.nullcontext()
    return isolated(spawn(int(torch.randint(2**62, ())), rank()))


def refuse(what: str, instead: str) -> None:
    """Stops what several processes would only do several times over, in one another's way.

    Raises:
        ValueError: Several processes were launched.
    """
    if launched()[1] > 1:
        raise ValueError(f"{what} is the work of one process, not of {launched()[1]}: {instead}")


def launched() -> tuple[int, int]:
    """The number of this process and how many were launched with it, whether or not they talk to one another."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """Where this process computes: the accelerator with its number on this machine, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()

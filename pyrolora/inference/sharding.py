"""A base model in shards over several processes (FSDP2): each holds a part of every layer, and all of the adapters."""

from __future__ import annotations

from accelerate import PartialState
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from pyrolora.inference import processes
from pyrolora.program import PyroLoRA


def shard(program: PyroLoRA, mesh: DeviceMesh | None = None) -> PyroLoRA:
    """Leaves ``1/n`` of the base model's layers in each of n processes; a layer is whole only while it runs.

    For bases that no accelerator holds alone. Guide, adapters, head and embeddings stay whole in every process: they
    are what is drawn, and small. Call it after the program is built and before `fit`, in every process:

        torchrun --nproc-per-node 8 train.py            # program = pl.shard(pl.PyroLoRA(...)); pl.fit(program, ...)

    From then on the base model runs in all processes together: each calls `fit`, `Posterior.predict` and the like with
    the same arguments. Saving is the first one's work as ever, and what it writes loads on an unsharded base.

    Memory of the layers: ``(1/n + 1/L)`` of L equal layers' weights, and their activations as before.

    Args:
        program: The Pyro model, built from the same weights in every process.
        mesh: The processes; default all of them, each with the device that the launcher gave it.

    Returns:
        The same program.

    Raises:
        ValueError: One process alone, a quantised base, or an architecture that does not say what its layers are.
    """
    if processes.launched()[1] == 1 and mesh is None:
        raise ValueError("one process has nobody to share a base model with: start several, with torchrun")
    base = program.model.get_base_model()
    if getattr(base, "is_quantized", False):
        raise ValueError("quantised weights cannot be sharded; with device_map='auto' they are spread layer by layer")
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"{type(base).__name__} does not name its layers (_no_split_modules): nothing to shard")
    if mesh is None:
        device = PartialState().device  # starts the communication, as the Trainer would
        mesh = init_device_mesh(device.type, (processes.count(),))
    _ = program.fingerprint  # computed now: later no process has all weights
    adapters = {
        program.model.get_submodule(path).get_parameter(key)
        for site in program.sites.values()
        for path, key in site.holders
    }
    for layer in layers:
        # What is drawn must not be gathered over the draw.
        own = {parameter for parameter in layer.parameters() if parameter in adapters}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=own)
    return program

"""The device that a backbone is loaded on."""

import os

import torch

from grasp_lora.errors import GraspError
from grasp_lora.models.settings import BackboneSettings
from grasp_lora.storage.processes import world_size


def device_for(settings: BackboneSettings) -> str:
    """Return "cpu", or a GPU as "cuda:0".

    Raises:
        GraspError: no GPU is there, or the backbone is to be split and there is nothing to split it over.
    """
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise GraspError("backbone device is 'cuda', but torch sees no CUDA GPU: use 'auto' or 'cpu'")
    on_cpu = settings.device == "cpu" or not available
    if settings.shard:
        if world_size() == 1:
            raise GraspError(
                "backbone.shard is true, but there is one process: start it with torchrun --nproc-per-node N -m grasp_lora run, "
                "or set backbone.shard to false"
            )
        if on_cpu and available:  # transformers takes the GPUs whatever is asked for
            raise GraspError("backbone.shard is true, which takes the GPUs, but backbone.device is 'cpu': use 'auto'")
    return "cpu" if on_cpu else f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"  # torchrun: one GPU for each process

"""Where the memory does not suffice: one line, and nothing of what filled it is held on to."""

import gc
import weakref

import pytest
import torch

from grasp_lora.errors import GraspError
from grasp_lora.storage.memory import enough_memory


@pytest.mark.parametrize(
    ("error", "on_gpu"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_what_filled_the_memory_is_free_while_the_error_is_kept(error: Exception, on_gpu: bool) -> None:
    filled: list[weakref.ref[torch.Tensor]] = []

    def fill() -> None:
        activations = torch.ones(3)
        filled.append(weakref.ref(activations))
        raise error

    with (
        pytest.raises(GraspError, match=r"^too little memory for the training .*; take less") as caught,
        enough_memory("the training", "take less"),
    ):
        fill()
    gc.collect()
    assert filled[0]() is None
    assert ("set CUDA_VISIBLE_DEVICES= in the environment" in str(caught.value)) == on_gpu


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), enough_memory("the training", "take less"):
        raise RuntimeError("shapes differ")

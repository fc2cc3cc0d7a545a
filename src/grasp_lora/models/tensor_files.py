"""Safetensors files of strangers: names, dtypes and shapes are checked before a single tensor is read.

The parser of safetensors itself checks that the header describes exactly the bytes that follow it, so nothing is ever allocated
that the file does not really contain. What it would take and an adapter never has is refused here.
"""

import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from grasp_lora.storage.reading import RefusedError, check_file
from grasp_lora.text.display import listed, quoted

MOST_BYTES = 16 * 2**30
MOST_TENSORS = 100_000  # an adapter on every expert of a large mixture has tens of thousands
MOST_NAME = 512
MOST_DIMENSIONS = 4
DTYPES = ("F64", "F32", "F16", "BF16")
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Read the header of a safetensors file: name of each tensor -> its shape.

    Raises:
        RefusedError: the file is no regular one, too large or damaged, or it holds something else than float tensors with plain
            names.
    """
    check_file(file, MOST_BYTES)
    with _opened(file) as stored:
        names = stored.offset_keys()
        if len(names) > MOST_TENSORS:
            raise RefusedError(f"it holds {len(names)} tensors; at most {MOST_TENSORS} are allowed")
        shapes = {}
        for name in names:
            if len(name) > MOST_NAME or not _NAME.fullmatch(name):
                raise RefusedError(
                    f"it holds a tensor named {quoted(name)}; a name is at most {MOST_NAME} letters, digits, '_' and '-', "
                    "with single dots between them"
                )
            tensor = stored.get_slice(name)
            dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
            if dtype not in DTYPES:
                raise RefusedError(
                    f"{name} has the dtype {quoted(dtype)}; allowed: {listed(DTYPES)}. Save it again as float32 or bfloat16"
                )
            if len(shape) > MOST_DIMENSIONS:
                raise RefusedError(f"{name} has {len(shape)} dimensions; at most {MOST_DIMENSIONS} are allowed")
            if 0 in shape:
                raise RefusedError(f"{name} has a dimension of size 0, so it holds no numbers")
            shapes[name] = shape
        return shapes


def read_tensors(file: Path, as_stored: Set[str] = frozenset()) -> dict[str, torch.Tensor]:
    """Read the tensors of a file whose shapes were checked, as float32; those of the names in `as_stored` as they are.

    Raises:
        RefusedError: the file cannot be read, or a tensor holds NaN or infinity, also after the conversion.
    """
    tensors = {}
    with _opened(file) as stored:
        for name in stored.offset_keys():
            tensors[name] = stored.get_tensor(name)
            if name in as_stored:
                continue
            tensors[name] = tensors[name].float()
            if not torch.isfinite(tensors[name]).all():
                raise RefusedError(f"{name} holds NaN or infinity; it is broken, train it again")
    return tensors


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise RefusedError(
            f"it is truncated, damaged or no safetensors file ({quoted(reason)[1:-1]}); download or save it again"
        ) from error
    except OSError as error:
        raise RefusedError(f"it cannot be read: {error.strerror or error}") from error

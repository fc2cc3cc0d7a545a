"""Safetensors files of strangers: the header is checked in full before a single tensor is read.

A header says what the file holds: names, dtypes, shapes and places. All of it must agree with the size of the file, so that
nothing is ever allocated that the file does not really contain.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grasp_lora.storage.reading import RefusedError, check_file, parse_json
from grasp_lora.text.display import listed, quoted

MOST_BYTES = 16 * 2**30
MOST_HEADER_BYTES = 16_000_000
MOST_TENSORS = 100_000  # an adapter on every expert of a large mixture has tens of thousands
MOST_NAME = 512
MOST_DIMENSIONS = 4
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_LENGTH_BYTES = 8  # a file begins with the length of its header


@dataclass(frozen=True)
class TensorFacts:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, TensorFacts]:
    """Read and check the header of a safetensors file.

    Raises:
        RefusedError: the file is no regular one, too large, truncated, or its header does not describe exactly its content
            in float tensors with plain names.
    """
    size = check_file(file, MOST_BYTES)
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                raise RefusedError(f"it is truncated or no safetensors file: {size} bytes, of which {length} a header")
            if length > MOST_HEADER_BYTES:
                raise RefusedError(f"its header has {length} bytes; at most {MOST_HEADER_BYTES} are allowed")
            text = opened.read(length).decode("utf-8")
    except OSError as error:
        raise RefusedError(f"it cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RefusedError("it is no safetensors file: its header is no text") from error
    try:
        header = parse_json(text)
    except RefusedError as error:
        raise RefusedError(f"its header is {error}") from error
    if not isinstance(header, dict):
        raise RefusedError("its header is no JSON object")
    _check_metadata(header.pop("__metadata__", None))
    if len(header) > MOST_TENSORS:
        raise RefusedError(f"it holds {len(header)} tensors; at most {MOST_TENSORS} are allowed")
    facts, places = {}, []
    for name, entry in header.items():
        facts[name], place = _check_entry(name, entry)
        places.append(place)
    end = 0
    for start, stop in sorted(places):
        if start != end:
            raise RefusedError(f"its tensors overlap or leave a gap at byte {min(start, end)} of the data")
        end = stop
    if end != size - _LENGTH_BYTES - length:
        raise RefusedError(
            f"it is truncated or damaged: its header describes {end} bytes of data, and "
            f"{size - _LENGTH_BYTES - length} follow"
        )
    return facts


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file whose header was checked, as float32.

    Raises:
        RefusedError: the file cannot be read, or a tensor holds NaN or infinity, also after the conversion.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise RefusedError(f"it cannot be read: {error}") from error
    converted = {}
    for name in list(tensors):
        converted[name] = tensors.pop(name).float()
        if not torch.isfinite(converted[name]).all():
            raise RefusedError(f"{name} holds NaN or infinity; it is broken, train it again")
    return converted


def _check_metadata(metadata: Any) -> None:
    if metadata is not None and not (
        isinstance(metadata, Mapping) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise RefusedError("the __metadata__ of its header must be an object of texts")


def _check_entry(name: str, entry: Any) -> tuple[TensorFacts, tuple[int, int]]:
    """Return the facts of a tensor, and where its bytes start and stop."""
    if len(name) > MOST_NAME or not _NAME.fullmatch(name):
        raise RefusedError(
            f"it holds a tensor named {quoted(name)}; a name is at most {MOST_NAME} letters, digits, '_' and '-', "
            "with single dots between them"
        )
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise RefusedError(f"its header describes {name} by something else than dtype, shape and data_offsets")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise RefusedError(
            f"{name} has the dtype {quoted(dtype)}; allowed: {listed(BYTES)}. Save it again as float32 or bfloat16"
        )
    if not _whole_numbers(shape) or not _whole_numbers(place) or len(place) != 2:
        raise RefusedError(f"its header gives {name} a shape or a place that is no list of whole numbers")
    if len(shape) > MOST_DIMENSIONS:
        raise RefusedError(f"{name} has {len(shape)} dimensions; at most {MOST_DIMENSIONS} are allowed")
    if 0 in shape:
        raise RefusedError(f"{name} has a dimension of size 0, so it holds no numbers")
    count = 1
    for dimension in shape:
        count *= dimension
        if count > MOST_BYTES:  # a dimension may have thousands of digits
            raise RefusedError(f"{name} claims more numbers than any allowed file holds")
    if place[1] - place[0] != count * BYTES[dtype]:
        raise RefusedError(
            f"{name} has shape {tuple(shape)} in {dtype}, which is {count * BYTES[dtype]} bytes, but its place has "
            f"{quoted(place[1] - place[0])}"
        )
    return TensorFacts(dtype, tuple(shape)), (place[0], place[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(part) is int and part >= 0 for part in value)

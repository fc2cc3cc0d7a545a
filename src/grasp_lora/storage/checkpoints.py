"""Checkpoints of a fine-tune that count only when they are whole.

A checkpoint is the folder `checkpoint-STEP` as transformers' Trainer writes it (optimizer, schedule, random states, log), with
the trained weights and our own state beside: tensors as safetensors, the rest as JSON. Its manifest holds the hash of
every file and is written last, so a folder without one is the remains of a process that died while writing it.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from grasp_lora.errors import GraspError
from grasp_lora.storage.reading import reading, sha256_of
from grasp_lora.storage.writing import discard, sync, write_whole

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
KEPT = 2  # the newest, and one to fall back on should it be damaged
LEAST_STEPS = 10  # between checkpoints: shorter trainings are sooner done again
_NAME = re.compile(r"checkpoint-(\d+)")

State = tuple[dict[str, Any], dict[str, Tensor]]  # JSON values, and tensors by name


def steps_between(steps_per_epoch: int, steps: int) -> int:
    """Optimizer steps from one checkpoint to the next: ten in a training, at least one an epoch, but not every few steps."""
    return max(LEAST_STEPS, min(steps_per_epoch, math.ceil(steps / 10)))


def checkpoint_at(folder: Path, step: int) -> Path:
    """The checkpoint of a step, where every Trainer puts it."""
    return folder / f"checkpoint-{step}"


def complete(checkpoint: Path, seconds: float) -> None:
    """Make a checkpoint count: put its files on the disk, write its manifest, and remove all but the newest two.

    The training has taken `seconds` up to it.

    Raises:
        OSError: it cannot be written; earlier checkpoints stay.
    """
    files = {}
    for file in sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name != MANIFEST):
        sync(file)
        files[file.name] = sha256_of(file)
    sync(checkpoint)
    write_whole(checkpoint / MANIFEST, json.dumps({"seconds": seconds, "sha256": files}, indent=1) + "\n")
    sync(checkpoint.parent)
    for old in _checkpoints(checkpoint.parent)[:-KEPT]:
        _remove(old)


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint that is whole, and remove what a process that died left half written.

    One whose files are not what its manifest says is reported, removed, and the one before it is taken.
    """
    for checkpoint in reversed(_checkpoints(folder)):
        if not (checkpoint / MANIFEST).is_file():
            discard(checkpoint)
        elif damage := _damage(checkpoint):
            logger.warning("%s is damaged (%s); it is removed and the one before it is used", checkpoint, damage)
            _remove(checkpoint)
        else:
            return checkpoint
    return None


def seconds_of(checkpoint: Path) -> float:
    """Return how long the training had taken up to a whole checkpoint."""
    return float(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["seconds"])


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a training that is done or begins anew."""
    for checkpoint in _checkpoints(folder):
        _remove(checkpoint)


def write_state(checkpoint: Path, name: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write JSON values and tensors into a checkpoint under a name."""
    (checkpoint / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    save_file(
        {key: tensor.detach().contiguous() for key, tensor in tensors.items()}, checkpoint / f"{name}.safetensors"
    )


def read_state(checkpoint: Path, name: str) -> State:
    """Read what `write_state` wrote; the tensors are on the CPU.

    Raises:
        GraspError: the checkpoint has no such state.
    """
    with reading(f"{checkpoint}, which has to hold the state of the {name}", GraspError):
        values = json.loads((checkpoint / f"{name}.json").read_text(encoding="utf-8"))
        return values, load_file(checkpoint / f"{name}.safetensors")


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a folder, whole or not, oldest first."""
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(paths, key=lambda path: int(path.name.rpartition("-")[2]))


def _remove(checkpoint: Path) -> None:
    # The manifest first: a kill in between leaves something unfinished, nothing that looks damaged.
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    discard(checkpoint)


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint that has a manifest."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        hashes = {checkpoint / Path(name).name: digest for name, digest in manifest["sha256"].items()}
        float(manifest["seconds"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return "its manifest cannot be read"
    changed = [file.name for file, digest in hashes.items() if not file.is_file() or sha256_of(file) != digest]
    return f"{changed[0]} is missing or has changed" if changed else None

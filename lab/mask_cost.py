"""What the masks of one adapter cost: tensor operations and milliseconds of each thing that is done with them.

    OMP_NUM_THREADS=1 python lab/mask_cost.py
    python lab/mask_cost.py --layers 32 --width 4096 --rank 16

The adapter is random, on q and v of so many layers (Gemma 3 270M's by default), merged of two of a rank. A step with a mask of
its own takes `commit`, `mask_gradients` and `enforce`; a round takes `rank` and `probe`. The time is the best of nine: the
process's own on a CPU with one thread.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from speed_figures import clock_of
from torch.utils._python_dispatch import TorchDispatchMode

from grasp_lora.method.lora import LoraPair, Segment
from grasp_lora.method.masks import MaskSet, MaskSettings

TRIES = 9
RATIO = 0.4


class Operations(TorchDispatchMode):
    """Counts tensor operations, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one and do it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def mask_set(layers: int, width: int, outputs: Sequence[int], rank: int, device: torch.device) -> MaskSet:
    """Masks of a random merged adapter, with gradients."""
    generator, segments = torch.Generator().manual_seed(0), (Segment("source", rank), Segment("target", rank))

    def parameter(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.randn(shape, generator=generator).to(device))

    pairs = {
        f"{layer}.{number}": LoraPair(parameter(2 * rank, width), parameter(size, 2 * rank), 1.0, segments)
        for layer in range(layers)
        for number, size in enumerate(outputs)
    }
    masks = MaskSet(pairs, MaskSettings())
    for weight in masks.weights.values():
        weight.grad = torch.ones_like(weight)
    return masks


def main(given: Sequence[str] | None = None) -> None:
    """Measure and write a table to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--width", type=int, default=640, help="of what enters q and v")
    parser.add_argument("--outputs", default="1024,256", help="widths of q and v")
    parser.add_argument("--rank", type=int, default=8, help="of each of the two adapters")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(given)
    device = torch.device(options.device)
    outputs = [int(size) for size in options.outputs.split(",")]
    masks = mask_set(options.layers, options.width, outputs, options.rank, device)
    ranking, now = masks.rank(), clock_of(device)[1]

    def probe() -> None:
        with masks.probe(RATIO, ranking):
            pass

    works: dict[str, Callable[[], object]] = {
        "commit": lambda: masks.commit(RATIO, ranking),
        "mask_gradients": masks.mask_gradients,
        "enforce": masks.enforce,
        "rank": masks.rank,
        "probe": probe,
        "reselect": lambda: masks.reselect(RATIO),
    }
    sys.stdout.write(
        f"{len(masks.weights)} factors, {sum(w.numel() for w in masks.weights.values())} weights, {device}\n\n"
    )
    sys.stdout.write("| what | operations | milliseconds |\n|---|---:|---:|\n")
    for name, work in works.items():
        seconds = []
        operations = Operations()
        for number in range(TRIES + 1):
            with nullcontext() if number else operations:
                started = now()
                work()
                seconds.append(now() - started)
        sys.stdout.write(f"| `{name}` | {operations.count} | {1000 * min(seconds[1:]):.1f} |\n")


if __name__ == "__main__":
    main()

"""What a quantised backbone costs and saves: the same run in several settings, each in a process of its own.

    OMP_NUM_THREADS=1 python lab/quantised.py demo-ar --settings float32,nf4,int8 --set data.target.test=20

prints a table of weights, peak memory, seconds and losses. A setting is a dtype, or a way to quantise; then float32
is computed in.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grasp_lora.engine.run import run
from grasp_lora.engine.session import Session
from grasp_lora.models.model_settings import QUANTISERS
from grasp_lora.recipes.load import load_recipe

MEGABYTE = 1e6
HEADER = """\
| setting | weights, MB | peak memory, MB | seconds | source | target | GRASP | GRASP, test |
|---|---:|---:|---:|---:|---:|---:|---:|
"""


def main() -> None:
    """Print the table, or in a process of one setting its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--settings", default="float32,nf4,int8")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sys.stdout.write(json.dumps(figures(options.recipe, [*options.changes, *changes_of(options.child)])) + "\n")
        return
    sys.stdout.write(HEADER)
    for setting in options.settings.split(","):
        command = [sys.executable, __file__, options.recipe, "--child", setting]
        changes = [word for change in options.changes for word in ("--set", change)]
        done = subprocess.run([*command, *changes], stdout=subprocess.PIPE, text=True, check=True)
        sys.stdout.write(row(setting, json.loads(done.stdout.splitlines()[-1])) + "\n")
        sys.stdout.flush()


def changes_of(setting: str) -> list[str]:
    """The recipe keys of a setting.

    >>> changes_of("nf4")
    ['backbone.dtype=float32', 'backbone.quantise=nf4']
    """
    if setting in QUANTISERS:
        return ["backbone.dtype=float32", f"backbone.quantise={setting}"]
    return [f"backbone.dtype={setting}"]


def figures(recipe: str, changes: Sequence[str]) -> dict[str, Any]:
    """Run a recipe and give what it took and came to; memory is the largest resident set of this process."""
    session = Session(*load_recipe(recipe, changes))
    weights = stored_bytes(session.backbone.model)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        result = run(session, place)
        seconds = sum(json.loads((place / "cost.json").read_text()).values())
        losses = {name: [one.dev_loss, one.test_loss] for name, one in result.metrics.systems.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"weights": weights, "peak": peak, "seconds": seconds, "losses": losses}


def stored_bytes(model: Any) -> int:
    """Bytes of a model's weights as they are stored, with the scales that quantised ones need; what is shared counts once."""
    total = 0
    for module in model.modules():
        if (
            rows := getattr(getattr(module, "state", None), "SCB", None)
        ) is not None:  # of an 8-bit layer that was used once
            total += rows.nbytes
    for parameter in model.parameters():
        scales = [getattr(parameter, "SCB", None), getattr(getattr(parameter, "quant_state", None), "absmax", None)]
        total += sum(part.nbytes for part in (parameter, *scales) if part is not None)
    return total


def row(setting: str, found: dict[str, Any]) -> str:
    """A line of the table; losses are those of the dev set where nothing is said."""
    losses = found["losses"]
    target = "target" if "target" in losses else "merged"  # with target.on their sum
    dev = [f"{losses[name][0]:.4f}" for name in ("source", target, "grasp")]
    sizes = [f"{found[name] / MEGABYTE:.0f}" for name in ("weights", "peak")]
    cells = [f"`{setting}`", *sizes, f"{found['seconds']:.0f}", *dev, f"{losses['grasp'][1]:.4f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

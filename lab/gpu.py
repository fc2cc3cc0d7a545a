"""All tests and benchmarks that want a GPU, on whatever card is there: one page of what they found.

    python lab/gpu.py
    python lab/gpu.py --recipe mlqa-ar --set data.root=FOLDER --page gpu.md

Without a CUDA GPU it says so in one line and does nothing. A part that fails is on the page with its last line, the others are
still done, and the exit status is 1.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "lab" / "results" / "gpu.md"
MEASURES = "step,probe,batches,controller,growth"
LIBRARIES = ("torch", "transformers", "peft")


def parts_of(recipe: str, overrides: Sequence[str]) -> dict[str, list[str]]:
    """Title -> command line of Python, of each part."""
    changes = [word for override in overrides for word in ("--set", override)]
    speed = ["lab/speed.py", recipe, *changes]
    return {
        "Tests": ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"],
        "Masks": ["lab/mask_cost.py", "--device", "cuda"],
        "Speed": [*speed, "--only", MEASURES],
        "Memory": [*speed, "--only", "memory"],
    }


def page_of(card: str, results: dict[str, tuple[list[str], int, str, float]]) -> str:
    """The page: the card, and of each part its command and what it wrote."""
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines = ["# On a GPU", "", "Written by `make gpu`.", "", f"- Card: {card}", f"- {libraries}"]
    for title, (command, status, output, seconds) in results.items():
        lines += ["", f"## {title}", "", "```", f"python {' '.join(command)}", "```", ""]
        lines += [f"Failed with status {status}: `{last_line(output)}`"] if status else shown(output)
        lines += ["", f"It took {seconds:.0f} s."]
    return "\n".join(lines) + "\n"


def shown(output: str) -> list[str]:
    """The tables of an output, or else its last line."""
    lines = output.splitlines()
    if any(line.startswith("|") for line in lines):
        return lines
    return [f"`{last_line(output)}`"]


def last_line(output: str) -> str:
    """The last line with a text."""
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")


def main(given: Sequence[str] | None = None) -> int:
    """Do all parts and write the page; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo-ar", help="what the benchmarks run; the embedded demo by default")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="a.b=value, of the recipe")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the page goes")
    options = parser.parse_args(given)
    if not torch.cuda.is_available():
        sys.stdout.write("skipped: there is no CUDA GPU here\n")
        return 0
    results = {}
    for title, command in parts_of(options.recipe, options.overrides).items():
        started = time.perf_counter()
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
        output = done.stdout if done.returncode == 0 else done.stdout + done.stderr
        results[title] = (command, done.returncode, output, time.perf_counter() - started)
        sys.stdout.write(f"{title}: {'failed, ' if done.returncode else ''}{last_line(output)}\n")
        options.page.write_text(page_of(torch.cuda.get_device_name(), results), encoding="utf-8")
    return int(any(status for _, status, _, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())

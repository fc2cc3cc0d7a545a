"""Attack every reader of foreign files for as long as one likes, and report what a GraspError did not stop.

    python benchmarks/fuzz.py --minutes 30 --crashes crashes

Inputs are valid files that are spoiled in their structure and in their bytes, as the tests do it a few times
(tests/hostile/attacks.py). Seeds count up from --seed, so that a run can be repeated. With --atheris, the same readers are
driven by coverage; that package is no dependency of the project.
"""

import argparse
import hashlib
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "hostile"), str(ROOT / "tests")]

SLOWEST_ALLOWED = 20  # seconds for one input


class TooSlow(BaseException):
    """An input took longer than allowed; no ordinary handler may catch it."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Attack every reader of foreign files.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--crashes", type=Path, default=Path("crashes"), help="folder for inputs that were not refused well"
    )
    parser.add_argument("--only", default="", help="part of the name of the readers to attack")
    parser.add_argument("--atheris", action="store_true", help="let coverage choose the inputs")
    options = parser.parse_args()

    if options.atheris:
        import atheris

        with atheris.instrument_imports(include=["grasp_lora", "yaml", "json", "csv"]):
            pass
    from attacks import Target, attack, random_input, targets
    from conftest import build_tiny_model

    logging.getLogger("grasp_lora").setLevel(logging.CRITICAL)
    found: dict[str, Path] = {}
    slowest: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    taken: Counter[str] = Counter()

    def alarm(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {SLOWEST_ALLOWED} s")

    def run(target: Target, content: bytes) -> None:
        started = time.perf_counter()
        signal.alarm(SLOWEST_ALLOWED)
        try:
            taken[target.name] += attack(target, content)
        except (Exception, TooSlow) as error:  # noqa: BLE001  whatever comes is what is looked for
            place = traceback.extract_tb(error.__traceback__)[-1]
            name = f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"
            if name not in found:
                options.crashes.mkdir(parents=True, exist_ok=True)
                found[name] = options.crashes / hashlib.sha256(content).hexdigest()[:16]
                found[name].write_bytes(content)
                sys.stdout.write(f"{target.name}: {name}: {str(error)[:200]!r} -> {found[name]}\n")
                sys.stdout.flush()
        finally:
            signal.alarm(0)
        runs[target.name] += 1
        slowest[target.name] = max(slowest[target.name], round(1000 * (time.perf_counter() - started)))

    signal.signal(signal.SIGALRM, alarm)
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        chosen = [each for each in targets(Path(scratch), build_tiny_model("llama")) if options.only in each.name]

        def by_coverage(data: bytes) -> None:
            """Take the first byte for the reader, and the rest for the input; end in time, since atheris never returns."""
            if time.monotonic() >= end:
                report(runs, taken, slowest, found)
                os._exit(bool(found))
            if data:
                run(chosen[data[0] % len(chosen)], data[1:])

        if options.atheris:
            corpus = Path(scratch) / "corpus"
            corpus.mkdir()
            for index, target in enumerate(chosen):
                for number, seed in enumerate(target.seeds):
                    (corpus / f"{index}-{number}").write_bytes(bytes([index]) + seed)
            arguments = [sys.argv[0], str(corpus), "-max_len=8192", "-verbosity=0", f"-seed={options.seed + 1}"]
            atheris.Setup(arguments, by_coverage)
            atheris.Fuzz()
        number = options.seed
        while time.monotonic() < end:
            for target in chosen:
                run(target, random_input(target, random.Random(number)))
                number += 1
    report(runs, taken, slowest, found)
    return bool(found)


def report(runs: Counter[str], taken: Counter[str], slowest: Counter[str], found: dict[str, Path]) -> None:
    """Write a table of what was run."""
    lines = [f"{'reader':<40} {'inputs':>9} {'taken':>9} {'slowest (ms)':>13}"]
    lines += [f"{name:<40} {runs[name]:>9} {taken[name]:>9} {slowest[name]:>13}" for name in runs]
    lines.append(f"{'all':<40} {runs.total():>9} {taken.total():>9} {max(slowest.values(), default=0):>13}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines.append(f"memory at most {memory:.0f} MB; kinds of crashes: {len(found)}")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

"""Whether a run survives being killed: tiny runs, killed with SIGKILL and resumed again and again until they are done.

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 200

Half of the kills come at a random event (before the run touches a file in its folder, around an optimizer step or a commit of
the controller), half after a random time, and so also in the middle of a write. A run that is done is compared, file by file
and bit by bit, with one of the same recipe that nothing happened to; a file that differs, is missing or is left over is a loss,
and so is a resume that ends with an error. Needs a system with fork; the model is the random two-layer one of the tests.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "bench")]

from conftest import build_tiny_model, build_tiny_tokenizer, write_tiny_workspace  # noqa: E402
from killed_runs import Attempt, attempt, load_everything  # noqa: E402

LONG = (
    "source.training.epochs=3", "target.training.epochs=3", "controller.training.epochs=4", "final.training.epochs=4",
    "target.training.patience=null", "final.training.patience=null", "save_every=4",
)  # fmt: skip
WAYS: dict[str, tuple[str, ...]] = {
    "defaults": LONG,
    "gradients and reselection": (
        *LONG, "mask.score=input_aware", "mask.scope=global", "final.mode=reselect", "final.mask.score=gradient_of_delta",
        "controller.rounds.every=2",
    ),
    "accumulation and fractions": (
        *LONG, "target.training.accumulation=3", "target.training.evaluate_every=0.5", "source.training.epochs=2.5",
        "mask.score=input_aware", "controller.preset=paper", "controller.rule=best_reward", "controller.training.accumulation=2",
    ),
}  # fmt: skip
# An attempt lives for at most so many events or such a share of a whole run's time, so that a run is killed several times.
MOST_EVENTS = 120
MOST_TIME = 0.4


def main() -> None:
    """Kill and resume, and write one JSON object to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    load_everything()
    with tempfile.TemporaryDirectory() as folder:
        backbone = Path(folder) / "tiny-llama"
        build_tiny_model("llama").save_pretrained(backbone)
        build_tiny_tokenizer().save_pretrained(backbone)
        workspace = write_tiny_workspace(Path(folder) / "work", backbone).parent
        found = kill_and_resume(workspace, arguments.kills, random.Random(arguments.seed))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def kill_and_resume(workspace: Path, kills: int, chance: random.Random) -> dict[str, Any]:
    """Kill runs until there have been so many kills and the last run is done; return the figures."""
    started = time.perf_counter()
    whole = {way: go_on(workspace, f"whole-{number}", way) for number, way in enumerate(WAYS)}
    most_seconds = MOST_TIME * (time.perf_counter() - started) / len(WAYS)
    stages: Counter[str] = Counter()
    moments: Counter[str] = Counter()
    losses: list[str] = []
    runs, steps, needed = 0, 0, 0
    while stages.total() < kills:
        way = list(WAYS)[runs % len(WAYS)]
        folder = f"run-{runs}"
        runs += 1
        needed += whole[way].steps
        while True:
            moment = "random time" if chance.random() < 0.5 else "event"
            if stages.total() >= kills:
                last = go_on(workspace, folder, way)
            elif moment == "event":
                last = go_on(workspace, folder, way, moments={chance.randint(1, MOST_EVENTS): "kill"})
            else:
                last = go_on(workspace, folder, way, seconds=chance.uniform(0.0, most_seconds))
            steps += last.steps
            if last.status != -9:
                break
            moments[moment] += 1
            stages[last.events[-1].split()[0] if last.events else "loading"] += 1
        names = sorted({**whole[way].files, **last.files})
        differing = [name for name in names if whole[way].files.get(name) != last.files.get(name)]
        if last.status != 0 or last.error or differing:
            losses.append(f"run {runs}, {way}: status {last.status} {last.error.strip()} {' '.join(differing)}")
    return {
        "kills": stages.total(),
        "losses": losses,
        "runs": runs,
        "kills_by_moment": dict(moments),
        "kills_by_stage": dict(stages.most_common()),
        "files_compared_in_each_run": len(next(iter(whole.values())).files),
        "optimizer_steps": {"needed": needed, "taken": steps},
        "seconds": round(time.perf_counter() - started),
    }


def go_on(workspace: Path, folder: str, way: str, **what_happens: Any) -> Attempt:
    """Begin or resume a run."""
    sets = [text for change in WAYS[way] for text in ("--set", change)]
    return attempt(workspace, ["run", "tiny.yaml", *sets, "--output", folder], workspace / folder, **what_happens)


if __name__ == "__main__":
    main()

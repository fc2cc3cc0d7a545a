"""Whether what is done survives a kill: tiny jobs, killed with SIGKILL and started again until they are done.

    OMP_NUM_THREADS=1 python lab/kills.py --kills 200

Every command that writes takes its turn. Half of the kills come at a random event (before a file in the folder is touched,
around an optimizer step or a commit of the controller), half after a random time, and so also in the middle of a write. What is
done in the end is compared, file by file and bit by bit, with what the same command leaves that nothing happened to. A file
that differs, is missing or is left over is a loss, and so is a second start that ends with an error. Needs a system with fork;
the model is the random two-layer one of the tests.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "engine")]

from conftest import build_tiny_model, build_tiny_tokenizer, write_tiny_workspace  # noqa: E402
from killed_runs import Attempt, attempt, load_everything  # noqa: E402


def sets(*changes: str) -> tuple[str, ...]:
    """Options that change a recipe."""
    return tuple(text for change in changes for text in ("--set", change))


LONG = (
    "source.training.epochs=3", "target.training.epochs=3", "controller.training.epochs=4", "final.training.epochs=4",
    "target.training.patience=null", "final.training.patience=null",
)  # fmt: skip
RUN = ("run", "tiny.yaml")
GIVEN = "given"  # the folder of a finished run, whose adapters the single steps take
WAYS: dict[str, tuple[str, ...]] = {
    "run": (*RUN, *sets(*LONG)),
    "run, gradients and reselection": (*RUN, *sets(
        *LONG, "mask.score=input_aware", "final.mode=reselect",
        "controller.rounds.every=2",
    )),
    "run, accumulation and fractions": (*RUN, *sets(
        *LONG, "target.training.accumulation=3", "source.training.epochs=2.5",
        "mask.score=input_aware", "controller.preset=paper", "controller.rule=best_reward",
    )),
    "compare": ("compare", "tiny.yaml", "--methods", "source_only,continued,grasp", "--seeds", "42"),
    "merge": ("merge", f"{GIVEN}/source", f"{GIVEN}/target"),
    "judge": ("judge", f"{GIVEN}/source", "backbone", "--rows", "fresh.jsonl", "--language", "de"),
    "export": ("export", f"{GIVEN}/merged", "--gguf"),
    "export, folded": ("export", f"{GIVEN}/merged", "--fold", "--dtype", "float32"),
    "init": ("init", "target.jsonl", "--language", "de", "--source", "source.jsonl"),
}  # fmt: skip
# Of a whole job's time and events. What goes on lives for a small share, so that it is killed several times; what begins anew may
# live longer than a whole job, so that it ends.
GOES_ON, BEGINS_ANEW = 0.4, 1.6


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
        rows = [{"prompt": f"fresh {number}?", "completion": f" {number}"} for number in range(8)]
        (workspace / "fresh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found = kill_and_resume(workspace, arguments.kills, random.Random(arguments.seed))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def kill_and_resume(workspace: Path, kills: int, chance: random.Random) -> dict[str, Any]:
    """Kill jobs until there have been so many kills and the last job is done; return the figures."""
    started = time.perf_counter()
    given = attempt(workspace, [*RUN, "--output", GIVEN], workspace / GIVEN)
    if given.status:
        raise RuntimeError(given.error)
    whole, seconds = {}, {}
    for number, way in enumerate(WAYS):
        begun = time.perf_counter()
        whole[way] = go_on(workspace, f"whole-{number}", way)
        seconds[way] = time.perf_counter() - begun
        if whole[way].status:
            raise RuntimeError(f"{way}: {whole[way].error}")
    commands: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    moments: Counter[str] = Counter()
    losses: list[str] = []
    jobs, steps, needed = 0, 0, 0
    while stages.total() < kills:
        way = min(WAYS, key=commands.__getitem__)
        folder = f"job-{jobs}"
        jobs += 1
        needed += whole[way].steps
        most = GOES_ON if WAYS[way][0] in ("run", "compare") else BEGINS_ANEW
        while True:
            moment = "random time" if chance.random() < 0.5 else "event"
            if stages.total() >= kills:
                last = go_on(workspace, folder, way)
            elif moment == "event":
                number = chance.randint(1, math.ceil(most * len(whole[way].events)) + 1)
                last = go_on(workspace, folder, way, moments={number: "kill"})
            else:
                last = go_on(workspace, folder, way, seconds=chance.uniform(0.0, most * seconds[way]))
            steps += last.steps
            if last.status != -9:
                break
            commands[way] += 1
            moments[moment] += 1
            stages[last.events[-1].split()[0] if last.events else "loading"] += 1
        # The lock of a process that was killed is free, and nothing of the result.
        names = sorted(name for name in {**whole[way].files, **last.files} if not name.endswith(".lock"))
        differing = [name for name in names if whole[way].files.get(name) != last.files.get(name)]
        was_done = (
            most == BEGINS_ANEW and last.status == 2 and "exist" in last.error
        )  # the kill came when all was there
        if differing or (not was_done and (last.status != 0 or last.error != whole[way].error)):
            losses.append(f"job {jobs}, {way}: status {last.status} {last.error.strip()} {' '.join(differing)}")
    return {
        "kills": stages.total(),
        "losses": losses,
        "jobs": jobs,
        "kills_by_command": dict(commands),
        "kills_by_moment": dict(moments),
        "kills_by_stage": dict(stages.most_common()),
        "files_compared": {way: len(one.files) for way, one in whole.items()},
        "optimizer_steps": {"needed": needed, "taken": steps},
        "seconds": round(time.perf_counter() - started),
    }


def go_on(workspace: Path, folder: str, way: str, **what_happens: Any) -> Attempt:
    """Begin a job, or start it again in the same place."""
    place = workspace / folder
    output = place / "recipe.yaml" if way == "init" else place
    # Drafts lie beside the folder that they become, under its name.
    return attempt(workspace, [*WAYS[way], "--output", str(output.relative_to(workspace))], place, **what_happens)


if __name__ == "__main__":
    main()

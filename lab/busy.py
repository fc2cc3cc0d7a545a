"""What other work on the machine costs: answering, training steps and a probe beside one busy process, over their time alone.

    python lab/busy.py demo-ar
    python lab/busy.py mlqa-ar --set data.root=FOLDER --pairs 5 --output busy.json

Four processes hold the same model. The threads of one look for work a short while before they sleep, as the command line has
it; those of one 3,000 times, as it had; one has a single thread, as a run has that begins beside a busy process; one does as
torch does where nothing says otherwise. All measurements take turns,
every second turn backwards; ratios are taken within a turn, and the table has their median and range. Nothing else may run on
the machine, and the busy process takes one core.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from speed_figures import Row, row, table, take_turns, wall_time
from speed_lab import RATIO, Lab, taken

from grasp_lora.errors import GraspError
from grasp_lora.method.masks import MaskSet
from grasp_lora.models.generation import answer
from grasp_lora.models.live import live_pairs, segments_of
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.threads import waiting_turns
from grasp_lora.training.probes import ProbeSet, calibrate

POLICY = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
DEFAULT = "as torch does"
WAYS = {
    "briefly": {"GOMP_SPINCOUNT": waiting_turns()},
    "3,000 turns": {"GOMP_SPINCOUNT": "3000"},
    "not, one thread": {"OMP_NUM_THREADS": "1"},
    DEFAULT: {},
}
ALONE, BESIDE = "alone", "beside one busy process"
WORKS = ("answering", "training step", "probe")
BUSY = "while True: pass"


def main() -> None:
    """Measure, and write the rows of the table to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo-ar")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--pairs", type=int, default=3, help="turns of every measurement")
    parser.add_argument("--answers", type=int, default=12, help="test prompts to answer")
    parser.add_argument("--examples", type=int, default=6, help="training examples of the timed steps")
    parser.add_argument("--output", type=Path, help="write all times as JSON here")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    with ExitStack() as stack:
        servers = {how: stack.enter_context(server(how)) for how in WAYS}
        for ask in servers.values():  # a turn that does not count; all load at the same time
            for work in WORKS:
                ask(work)
        works: dict[str, Callable[[], list[float]]] = {}
        for work in WORKS:
            for how, ask in servers.items():
                works[f"{work}, {how}, {ALONE}"] = partial(ask, work)
                works[f"{work}, {how}, {BESIDE}"] = partial(beside, ask, work)
        times = take_turns(works, arguments.pairs, warm_up=False)
    if arguments.output:
        arguments.output.write_text(json.dumps(times, indent=1), encoding="utf-8")
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, times are wall times\n")  # noqa: T201
    print(table(rows(times)))  # noqa: T201


def rows(times: dict[str, list[list[float]]]) -> list[Row]:
    """Each work beside the busy process over alone, for each way to wait; and what each costs alone."""
    found = []
    for work in WORKS:
        alone = {how: times[f"{work}, {how}, {ALONE}"] for how in WAYS}
        walls = {how: [wall for wall, _ in turns] for how, turns in alone.items()}
        for how, turns in alone.items():
            other = [wall for wall, _ in times[f"{work}, {how}, {BESIDE}"]]
            note = f"alone it keeps {sum(cpu for _, cpu in turns) / sum(walls[how]):.2f} cores busy"
            found.append(row(work, f"{BESIDE} / {ALONE}, waiting {how}", other, walls[how], note=note))
        for how in WAYS:
            if how != DEFAULT:
                found.append(row(work, f"{ALONE}: waiting {how} / {DEFAULT}", walls[how], walls[DEFAULT]))
    return found


@contextmanager
def server(how: str) -> Iterator[Callable[[str], list[float]]]:
    """Start a process that holds the model, and give a function from the name of a work to its wall and CPU seconds there."""
    environment = {name: value for name, value in os.environ.items() if name not in POLICY} | WAYS[how]
    process = subprocess.Popen(
        [sys.executable, *sys.argv, "--serve"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def ask(work: str) -> list[float]:
        print(work, file=stdin, flush=True)
        line = stdout.readline()
        if not line:
            raise GraspError(f"the process that waits {how} ended with status {process.wait()}")
        return [float(word) for word in line.split()]

    try:
        yield ask
    finally:
        process.kill()
        process.wait()


def beside(ask: Callable[[str], list[float]], work: str) -> list[float]:
    """Ask while another process keeps a core busy."""
    with subprocess.Popen([sys.executable, "-c", BUSY]) as busy:
        time.sleep(0.2)  # until it has begun
        try:
            return ask(work)
        finally:
            busy.kill()


def serve(arguments: argparse.Namespace) -> None:
    """Load the model, then do each work that a line of standard input names, and answer with its wall and CPU seconds."""
    recipe, base = load_recipe(arguments.recipe, arguments.overrides)
    lab = Lab(recipe, base, (), arguments.examples, 1, {}, now=wall_time)
    session, splits = lab.session, lab.session.splits
    prompts = [example.prompt_ids for example in splits.test[: arguments.answers]]
    train, probes = taken(splits.train, arguments.examples), ProbeSet(splits.micro_dev or splits.dev)
    with lab.on() as model:
        masks = MaskSet(live_pairs(model, segments_of(lab.merged)), recipe.mask)
        calibrate(model, masks, probes)
        ranking = masks.rank()

        def probe() -> None:
            with masks.probe(RATIO, ranking):
                probes.losses(model)

        works: dict[str, Callable[[], object]] = {
            "answering": lambda: answer(model, session.backbone.tokenizer, prompts, recipe.generation),
            "training step": lambda: lab.epoch(model, train, recipe.final.training),
            "probe": probe,
        }
        for line in sys.stdin:
            started, used = time.perf_counter(), time.process_time()
            works[line.strip()]()
            print(time.perf_counter() - started, time.process_time() - used, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

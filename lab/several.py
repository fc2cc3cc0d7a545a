"""Several adapters of different tasks in one: what the sum loses, and what a learned ratio, scale or weight each wins back.

    python lab/several.py draw SET DRAW FOLDER     # one draw: FOLDER/SET-DRAW.json; it goes on where it was stopped
    python lab/several.py table FILE [FILE ...]    # share of the adapters' own gain that is kept, and the differences

Each adapter is trained on rows of its own task alone; nothing is trained after the merge. What is learned is chosen by the mean
loss of `PROBES` rows of each task, by forward passes alone. The plan is in `lab/log.md`. Needs GRASP_LORA_DATA.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from few_rows import articles_of

from grasp_lora.engine.check import check
from grasp_lora.engine.results import Adapter, main_metric
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import Store, key_of
from grasp_lora.evaluation.statistics import compare_with_baselines
from grasp_lora.method.masks import prune
from grasp_lora.method.merging import MergeSettings
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.claims import Workplace, working_in
from grasp_lora.storage.writing import write_json

PROBES, TEST = 12, 50
GRID = tuple(step / 10 for step in range(1, 10))
COMMON = [
    "target.on=null", "data.source=null", "source.adapters=[demo-zh-qa]", "data.target.train=150", "data.target.micro_dev=2",
    f"data.target.dev={PROBES}", f"data.target.test={TEST}", "lora.target_modules=all-linear", "backbone.dtype=bfloat16",
    "target.training.epochs=2", "target.training.learning_rate=3.0e-4", "target.training.batch_size=2",
    "target.training.patience=null",
]  # fmt: skip
SHORT = ["data.max_tokens=256"]
ENGLISH_LABELS = [
    "data.target.language=en",
    *(
        f"data.target.files.{split}=[nusax/english-{file}.csv]"
        for split, file in {"train": "train", "dev": "valid", "test": "test"}.items()
    ),
]
TITLES = ["data.max_document_tokens=128", "generation.max_new_tokens=32"]
TASKS = {
    # Trained on 1,000 English rows of TyDi QA, so it is tested on those of MLQA.
    "english questions": ("mlqa-zh", [
        *SHORT, "data.target.language=en", "data.target.files=[mlqa/dev-context-en-question-en.json]", "data.target.train=2",
        "target.adapter=english-qa",
    ]),
    "swahili questions": ("tydiqa-sw", SHORT),
    "korean questions": ("tydiqa-ko", SHORT),
    "english labels": ("nusax-su", ENGLISH_LABELS),
    "sundanese labels": ("nusax-su", []),
    "chinese titles": ("xlsum-zh", [*TITLES, "data.target.files=[summ_extra/chinese_simplified.jsonl]"]),
    "english titles": ("xlsum-zh", [*TITLES, "data.target.language=en", "data.target.files=[summ_extra/english.jsonl]"]),
}  # fmt: skip
SETS = {
    "four": ("english questions", "swahili questions", "english labels", "chinese titles"),
    "three": ("korean questions", "sundanese labels", "english titles"),
}
MERGED = ("sum", "average", "ties", "ratio", "scale", "scale and ratio", "weights")


class Merges:
    """The adapters of a set, their merges, and what a merge is worth on the probes of every task."""

    def __init__(self, tasks: Mapping[str, Steps]) -> None:
        self.tasks = tasks
        self.parents = [steps.target() for steps in tasks.values()]
        self.seen: dict[str, float] = {}

    def sum_of(self, weights: Sequence[float], ratio: float = 0.0) -> Adapter:
        """The exact sum with a weight each; a ratio zeroes the smallest of each factor of each adapter."""
        steps = next(iter(self.tasks.values()))
        summed = steps.merge("several", self.parents, list(self.tasks), MergeSettings("exact", tuple(weights)))
        if ratio == 0.0:
            return summed
        return Adapter(key_of("pruned", {"of": summed.key, "ratio": ratio}), lambda: prune(summed.weights, ratio))

    def ties(self) -> Adapter:
        steps = next(iter(self.tasks.values()))
        return steps.merge("several", self.parents, list(self.tasks), MergeSettings("ties"))

    def loss(self, weights: Sequence[float], ratio: float = 0.0) -> float:
        """The mean over tasks of the mean loss of their probes."""
        key = f"{' '.join(f'{weight:.2f}' for weight in weights)} at {ratio:.1f}"
        if key not in self.seen:
            adapter = self.sum_of(weights, ratio)
            self.seen[key] = fmean(steps.losses(adapter, "dev").result.mean for steps in self.tasks.values())
        return self.seen[key]


def lowest(choices: Sequence[float], loss: Callable[[float], float]) -> float:
    return min(choices, key=loss)


def weights_from(start: Sequence[float], loss: Callable[[Sequence[float]], float]) -> tuple[float, ...]:
    """A weight for each adapter: one at a time goes up or down while that lowers the loss, first by 0.2 and then by 0.1."""
    best = tuple(start)
    for step in (0.2, 0.1):
        for at, sign in product(range(len(best)), (step, -step)):
            while 0.0 <= best[at] + sign <= 1.51:
                tried = tuple(round(weight + sign * (at == place), 2) for place, weight in enumerate(best))
                if loss(tried) >= loss(best):
                    break
                best = tried
    return best


def steps_of(task: str, draw: int, folder: Path, work: Workplace) -> Steps:
    name, changes = TASKS[task]
    recipe = load_recipe(name, [*COMMON, *changes, f"seed={draw}"])[0]
    session = Session(recipe, Path.cwd())
    check(session)
    store = Store(folder / "steps", session.progress, work)
    return Steps(session, store, stop_requested=lambda: work.interruption.asked_by)


def draw_of(name: str, draw: int, folder: Path, work: Workplace) -> None:
    """Train the adapters of a set, choose what is learned on the probes, and measure all on the test rows of each task."""
    tasks = {task: steps_of(task, draw, folder, work) for task in SETS[name]}
    merges = Merges(tasks)
    count, file = len(tasks), folder / f"{name}-{draw}.json"
    one = [1.0] * count
    ratio = lowest((0.0, *GRID), lambda ratio: merges.loss(one, ratio))
    scale = lowest((*GRID, 1.0), lambda scale: merges.loss([scale] * count))
    ratio_of_scaled = lowest((0.0, *GRID[:6]), lambda ratio: merges.loss([scale] * count, ratio))
    before = len(merges.seen)
    weights = weights_from([scale] * count, partial(merges.loss))
    learned = {"ratio": ratio, "scale": scale, "scale and ratio": [scale, ratio_of_scaled], "weights": weights}
    record: dict[str, Any] = {"set": name, "draw": draw, "learned": learned, "probed": merges.seen, "systems": {}}
    record["tried for the weights"] = len(merges.seen) - before
    systems: dict[str, Adapter] = {
        "backbone": next(iter(tasks.values())).alone(),
        **dict(zip(tasks, merges.parents, strict=True)),
        "sum": merges.sum_of(one),
        "average": merges.sum_of([1 / count] * count),
        "ties": merges.ties(),
        "ratio": merges.sum_of(one, ratio),
        "scale": merges.sum_of([scale] * count),
        "scale and ratio": merges.sum_of([scale] * count, ratio_of_scaled),
        "weights": merges.sum_of(weights),
    }
    record["articles"] = {task: articles_of(steps.splits.test) for task, steps in tasks.items()}
    for system, adapter in systems.items():
        asked = {task: steps for task, steps in tasks.items() if system not in tasks or system == task}
        record["systems"][system] = {task: measured(steps, adapter) for task, steps in asked.items()}
        write_json(file, record)


def measured(steps: Steps, adapter: Adapter) -> dict[str, list[float]]:
    """Scores and losses of the test rows of one task."""
    found = steps.measure(adapter, on_dev=False)
    assert found.test is not None
    metric = main_metric(list(steps.session.metrics))
    return {
        "scores": [round(float(score), 4) for score in found.metrics[metric].per_example],
        "losses": [round(loss, 4) for loss in found.test.result.losses],
    }


def table(draws: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Of each set: the scores of the tasks, the share of the adapters' own gain that is kept, what was learned; then verdicts
    over all draws of a set, by test rows and draws."""
    for name in dict.fromkeys(draw["set"] for draw in draws):
        of_set = [draw for draw in draws if draw["set"] == name]
        tasks = SETS[name]
        yield f"{name} adapters, {len(of_set)} draws"
        yield "| merge | " + " | ".join(tasks) + " | mean | gain kept | loss |"
        yield "|---|" + "---:|" * (len(tasks) + 3)
        for system in ("backbone", "each alone", *MERGED):
            scores = [score_of(of_set, system, task) for task in tasks]
            kept = share_kept(of_set, system, "scores")
            loss = fmean(score_of(of_set, system, task, "losses") for task in tasks)
            cells = " | ".join(f"{score:.1f}" for score in scores)
            yield f"| {system} | {cells} | {fmean(scores):.1f} | {kept:.0f} % | {loss:.3f} |"
        for draw in of_set:
            yield f"draw {draw['draw']}: {json.dumps(draw['learned'])}"
        for ours, theirs in (
            *(("ratio", other) for other in ("sum", "average", "ties", "scale", "weights")),
            *(("scale", other) for other in ("sum", "average", "ties", "weights")),
            ("weights", "average"), ("scale and ratio", "scale"),
        ):  # fmt: skip
            both = [
                [score for draw in of_set for task in tasks for score in draw["systems"][side][task]["scores"]]
                for side in (ours, theirs)
            ]
            groups = [
                f"{draw['draw']} {task} {article}"
                for draw in of_set for task in tasks for article in draw["articles"][task]
            ]  # fmt: skip
            found = compare_with_baselines(both[0], {theirs: both[1]}, groups=groups)[theirs]
            each = " ".join(
                f"{fmean(score_of([draw], ours, task) - score_of([draw], theirs, task) for task in tasks):+.1f}"
                for draw in of_set
            )
            yield f"{ours} minus {theirs}: {found.difference:+.1f} ({found.low:+.1f} to {found.high:+.1f}); by draw {each}"


def score_of(draws: Sequence[Mapping[str, Any]], system: str, task: str, what: str = "scores") -> float:
    return fmean(fmean(draw["systems"][task if system == "each alone" else system][task][what]) for draw in draws)


def share_kept(draws: Sequence[Mapping[str, Any]], system: str, what: str) -> float:
    """Of what the adapters gain over the backbone, each on its own task, the share that one merge of them gains, percent."""
    tasks = SETS[draws[0]["set"]]
    base, alone, ours = (
        sum(score_of(draws, name, task, what) for task in tasks) for name in ("backbone", "each alone", system)
    )
    return 100 * (ours - base) / (alone - base)


def main(job: str, *words: str) -> None:
    if job == "table":
        sys.stdout.write("\n".join(table([json.loads(Path(file).read_bytes()) for file in words])) + "\n")
        return
    assert job == "draw", job
    name, draw, place = words
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    with working_in(folder) as work:
        work.begin(shared=True)
        draw_of(name, int(draw), folder, work)


if __name__ == "__main__":
    main(*sys.argv[1:])

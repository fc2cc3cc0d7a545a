"""What few rows come to, as `init` splits and trains them, with a test set that tells. The plans are in `lab/log.md`.

    python lab/few_rows.py every SETTING DRAW FOLDER   # one draw: FOLDER/every-SETTING-DRAW.json
    python lab/few_rows.py table FILE [FILE ...]       # means over draws, with 95 % intervals over the draws
    python lab/few_rows.py beside FILE [FILE ...]      # draws of `every` beside the same with dev rows

All rows of a draw teach. Records without `every` in their names had dev rows, and the jobs `draw` and `elsewhere` of commit
f5e5252f. Settings `sw` and `su` draw 45 rows, what 60 are after their test quarter; `sw100`, `ko100` and `su100` draw 75, what
100 are. `sw200`, `su200` and `min200` draw 150, what 200 are. `su400`, `su200` and `min200` have 400 English rows, the other
settings of labels 120. Questions have `english-qa`, but with `-weak` an adapter of 120 English rows, with `-middle` one of 400;
these and the `-300` test on 300 rows. `titles` asks for the titles of Chinese abstracts, with 144 English rows of headlines.
Draws of a setting share the source adapter and the test rows; their other rows are disjoint.
`ko`, `ko100`, `zh`, `ar`, `min` and `min100` are to confirm: each of their draws has a training seed of its own.
Needs GRASP_LORA_DATA.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from choices import clearly_ahead
from scipy.stats import t as student

from grasp_lora.data.encode import Example
from grasp_lora.data.splits import Splits
from grasp_lora.engine.check import check
from grasp_lora.engine.deliver import mean_of
from grasp_lora.engine.results import Adapter, main_metric
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import Store
from grasp_lora.evaluation.statistics import PairedComparison, compare_with_baselines
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.claims import Workplace, working_in
from grasp_lora.storage.writing import write_json

OTHERS = ("source", "target", "merged", "continued", "averaged")
PLAIN, WITHOUT = "merge, trained further", ", without a controller"
ASKED = ", dev rows asked"  # the rule until 2026-12-02, whose records have the scores of the dev rows
EXPECTED = ", GRASP's result expected"  # the one before that
# Rows of a draw, those of them to judge by; there is room for six draws or more, for three of 200 rows.
SIZES = {60: (45, 15), 100: (75, 25), 200: (150, 50)}
EPOCHS, EPOCHS_OF_OTHERS = (2,), (3,)  # where all rows teach
LANGUAGES = {
    "sw": "Swahili",
    "ko": "Korean",
    "zh": "Chinese",
    "ar": "Arabic",
    "su": "Sundanese",
    "min": "Minangkabau",
    "titles": "Chinese titles",
}
RECORDS = Path(__file__).parent / "results/few-rows"
ON_RECORD = {"zh": "xquad", "su": "mean-su"}  # where a setting has another name there
CONFIRMING = ("ko", "ko100", "zh", "ar", "min", "min100")
# As `init` writes them; the draws of `sw` and `su` on record were made before it wrote a patience.
COMMON = ["data.target.dev=2", "data.target.micro_dev=2", "source.training.epochs=2"]
FEW = [*COMMON, "target.on=null", "final.prune_ratio=0", "data.target.train=270"]
MORE = [*COMMON, "data.target.train=450"]
QUESTIONS = [
    "data.source=null",
    "source.adapters=[english-qa]",
    "data.target.test=150",
    "lora.target_modules=all-linear",
    *(f"{stage}.training.learning_rate=3.0e-5" for stage in ("target", "controller", "final")),
]
PATIENT = ["final.training.patience=2"]
MINANGKABAU = [
    "name=nusax-min",
    "data.target.train=450",
    "data.target.language=min",
    *(
        f"data.target.files.{split}=[nusax/minangkabau-{file}.csv]"
        for split, file in {"train": "train", "dev": "valid", "test": "test"}.items()
    ),
]
XQUAD = {
    setting: [
        f"data.target.files={{pool: mlqa/dev-context-{setting}-question-{setting}.json, test: xquad/xquad.{setting}.json}}",
        "data.target.test=1",  # of the pool
    ]
    for setting in ("zh", "ar")
}
WEAK = ["data.source.train=120", "data.source.dev=12"]
# Questions with a source adapter trained in the run, as `init` writes it, in place of `english-qa`.
MIDDLE = ["data.source.train=400", "data.source.dev=40"]
TRAINED = [
    "data.source={language: en, files: [tydiqa/en.json]}",
    "source.adapters=[]",
    "source.training.learning_rate=1.0e-4",
]
TEST = ["data.target.test=300"]
TITLES = [
    "name=titles",
    "data.target.train=495",
    "data.target.files=[summ_extra/chinese_simplified.jsonl]",
    "data.target.test=150",
    "data.source.files=[xlsum/english.jsonl]",
    "data.source.train=144",
    "data.source.dev=16",
    "generation.max_new_tokens=32",
]
SETTINGS = {
    "sw": ("tydiqa-sw", 60, [*FEW, *QUESTIONS, *PATIENT]),
    "ko": ("tydiqa-ko", 60, [*FEW, *QUESTIONS, *PATIENT, "data.target.test=300"]),
    "zh": ("mlqa-zh", 60, [*FEW, *QUESTIONS, *PATIENT]),
    "ar": ("mlqa-ar", 60, [*FEW, *QUESTIONS, *PATIENT, "data.target.test=100"]),
    "titles": ("xlsum-zh", 60, [*FEW, *PATIENT, *TITLES]),
    "su400": ("nusax-su", 60, [*FEW, *PATIENT]),
    "min": ("nusax-su", 60, [*FEW, *WEAK, *PATIENT, *MINANGKABAU]),
    "min100": ("nusax-su", 100, [*MORE, *WEAK, *MINANGKABAU, "target.on=source"]),
    "su200": ("nusax-su", 200, [*MORE, "final.prune_ratio=0"]),
    "min200": ("nusax-su", 200, [*MORE, "final.prune_ratio=0", *MINANGKABAU]),
    "su": ("nusax-su", 60, [*FEW, *WEAK]),
    "sw100": ("tydiqa-sw", 100, [*MORE, *QUESTIONS]),
    "ko100": ("tydiqa-ko", 100, [*MORE, *QUESTIONS, "data.target.test=600"]),
    "sw200": ("tydiqa-sw", 200, [*MORE, *QUESTIONS]),
    "su100": ("nusax-su", 100, [*MORE, *WEAK, "target.on=source"]),
    "sw-300": ("tydiqa-sw", 60, [*FEW, *QUESTIONS, *TEST]),
    "sw100-300": ("tydiqa-sw", 100, [*MORE, *QUESTIONS, *TEST]),
    "sw200-300": ("tydiqa-sw", 200, [*MORE, *QUESTIONS, *TEST]),
    "ko-weak": ("tydiqa-ko", 60, [*FEW, *QUESTIONS, *TEST, *TRAINED, *WEAK]),
    "sw100-weak": ("tydiqa-sw", 100, [*MORE, *QUESTIONS, *TEST, *TRAINED, *WEAK]),
    "ko-middle": ("tydiqa-ko", 60, [*FEW, *QUESTIONS, *TEST, *TRAINED, *MIDDLE]),
    "sw200-middle": ("tydiqa-sw", 200, [*MORE, *QUESTIONS, *TEST, *TRAINED, *MIDDLE]),
}


def drawn(splits: Splits, draw: int, size: int) -> Splits:
    """The rows of one draw; dev takes the first whole groups."""
    of_draw, place = SIZES[size]
    groups = [
        list(rows) for _, rows in groupby(sorted(splits.train, key=lambda row: row.group), key=lambda row: row.group)
    ]
    groups.sort(key=lambda rows: min(splits.train.index(row) for row in rows))
    rows = [row for group in groups for row in group][(draw - 1) * of_draw : draw * of_draw]
    while rows[place].group == rows[place - 1].group:
        place += 1
    return replace(splits, dev=tuple(rows[:place]), train=tuple(rows[place:]), micro_dev=())


def measured(steps: Steps, adapter: Adapter, *, on_dev: bool = True) -> dict[str, Any]:
    """Losses and scores of one system, a number a row."""
    found = steps.measure(adapter)
    assert found.test is not None
    metric = main_metric(list(steps.session.metrics))
    record: dict[str, Any] = {
        "test_losses": [round(loss, 4) for loss in found.test.result.losses],
        "test_scores": [round(float(score), 4) for score in found.metrics[metric].per_example],
    }
    if on_dev:
        record["dev_losses"] = [round(loss, 4) for loss in steps.losses(adapter, "dev").result.losses]
    if adapter.made is not None:
        record["best_step"] = adapter.made.result.best_step
    return record


def steps_of(setting: str, draw: int, folder: Path, work: Workplace, more: Sequence[str] = ()) -> Steps:
    """The steps of one draw; its recipe and rows are loaded."""
    name, size, changes = SETTINGS[setting]
    loaded = Session(load_recipe(name, [*changes, *more])[0], Path.cwd())
    check(loaded)
    seed = 10 + draw if setting in CONFIRMING else loaded.recipe.seed
    splits = loaded.splits
    if setting in XQUAD:  # which is the test, so that the rows of MLQA set aside for one are left for draws 7 to 9
        splits = replace(splits, train=(*splits.train, *splits.test))
    session = loaded.variant(loaded.recipe.model_copy(update={"seed": seed}), drawn(splits, draw, size))
    store = Store(folder / "steps", session.progress, work)
    return Steps(session, store, stop_requested=lambda: work.interruption.asked_by)


def every(setting: str, draw: int, folder: Path, work: Workplace) -> None:
    """All rows of a draw teach, for a number of epochs that is fixed: no row says when to stop."""
    name = SETTINGS[setting][0]
    record: dict[str, Any] = {"setting": setting, "draw": draw}
    for epochs in EPOCHS if name.startswith(("mlqa", "tydiqa")) else EPOCHS_OF_OTHERS:
        fixed = [
            f"{stage}.training.{key}" for stage in ("target", "final") for key in (f"epochs={epochs}", "patience=null")
        ]
        steps = steps_of(setting, draw, folder, work, [*fixed, "target.on=null", "final.prune_ratio=0"])
        splits = steps.splits
        splits = replace(splits, train=(*splits.dev, *splits.train), dev=())
        if setting in XQUAD:
            splits = replace(splits, test=on_xquad(setting))
        steps = Steps(
            steps.session.variant(steps.recipe, splits), steps.store, stop_requested=lambda: work.interruption.asked_by
        )
        merged, continued = steps.parents().merged, steps.continued()
        grasp = steps.finetune(merged, 0.0)
        systems = {"continued": continued, "averaged": mean_of(steps, continued, grasp)}
        if name.startswith("nusax"):
            systems |= {"merged": merged, "grasp": grasp, "mean with merged": mean_of(steps, continued, merged)}
        record |= {"train": len(splits.train), "articles": articles_of(splits.test)}
        record[f"epochs {epochs}"] = {key: measured(steps, of, on_dev=False) for key, of in systems.items()}
    write_json(folder / f"every-{setting}-{draw}.json", record)


def articles_of(rows: Sequence[Example]) -> list[int]:
    """Which article each row is on, by number: several questions may be on one."""
    groups = list(dict.fromkeys(row.group for row in rows))
    return [groups.index(row.group) for row in rows]


def on_xquad(setting: str) -> tuple[Example, ...]:
    """The test rows of XQuAD."""
    name, _, changes = SETTINGS[setting]
    other = Session(load_recipe(name, [*changes, *XQUAD[setting]])[0], Path.cwd())
    check(other)
    return tuple(row for row in other.splits.test if row.where.startswith("xquad"))


def table(draws: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Each system of each setting, and what a controller changes; after +- half of the 95 % interval over the draws."""
    everywhere: list[dict[str, Any]] = []
    for setting, group in groupby(
        sorted(draws, key=lambda draw: str(draw["setting"])), key=lambda draw: draw["setting"]
    ):
        of_setting = list(group)
        found = [{**draw["systems"], **handed_over(draw)} for draw in of_setting]
        names = [name for name in found[0] if all("test_scores" in each.get(name, ()) for each in found)]
        yield f"{setting}, {len(found)} draws: score (minus continued), test loss (minus continued)"
        for name in names:
            score, loss = ([fmean(each[name][key]) for each in found] for key in ("test_scores", "test_losses"))
            beside = [over(found, name, "continued", key) for key in ("test_scores", "test_losses")]
            yield f"  {name:22} {fmean(score):5.1f} ({beside[0]})   {fmean(loss):.3f} ({beside[1]})"
        articles = of_setting[0].get("articles")
        for key in (name for name in names if name.startswith(("delivered", "averaged"))):
            ours, theirs = ([each[name]["test_scores"] for each in found] for name in (key, "continued"))
            of_draws = [shown(*pair, articles) for pair in zip(ours, theirs, strict=True)]
            verdicts = Counter(each.verdict or "no verdict" for each in of_draws)
            counts = ", ".join(f"{kind} {count}" for kind, count in verdicts.items())
            gaps, rows = " ".join(f"{each.difference:+.1f}" for each in of_draws), shown(ours, theirs, articles)
            yield f"  {key}, minus continued: {gaps} ({counts}); over the test rows {rows.low:+.1f} to {rows.high:+.1f}"
        for name, other in (("grasp", PLAIN), ("delivered", f"delivered{WITHOUT}")):
            if other in names:
                gains = [over(found, name, other, key) for key in ("test_scores", "test_losses")]
                yield f"  {name} minus {other}: score {gains[0]}, loss {gains[1]}"
        everywhere += found
    yield f"all {len(everywhere)} draws: delivered minus continued {over(everywhere, 'delivered', 'continued', 'test_scores')}"
    for ours, theirs in (
        ("delivered", f"delivered{ASKED}"),
        ("averaged", "continued"),
        ("averaged", f"averaged{WITHOUT}"),
        ("averaged", f"delivered{EXPECTED}"),
    ):
        both = [each for each in everywhere if all("test_scores" in each.get(name, ()) for name in (ours, theirs))]
        if both:
            score, loss = (over(both, ours, theirs, key) for key in ("test_scores", "test_losses"))
            yield f"  {ours} minus {theirs}, {len(both)} draws: score {score}, loss {loss}"
    usual = f"delivered{EXPECTED}"
    instead = [
        each for each in everywhere if each["delivered"] is each["continued"] is not each.get(usual, each["continued"])
    ]
    if instead:
        gap = over(instead, usual, "continued", "test_scores")
        yield f"  GRASP's result, where it would be handed over in place of continued, {len(instead)} draws: {gap}"


def beside(draws: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What comes of all rows, beside the same draws with dev rows where those are on record; each draw, over the test rows, and
    over the draws of a language, of a kind of task, and of all. A star: shown by a draw's own test rows."""
    everywhere: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for setting, group in groupby(draws, key=lambda draw: str(draw["setting"])):
        pairs: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
        language = next(name for start, name in LANGUAGES.items() if setting.startswith(start))
        kind = "labels" if setting.startswith(("su", "min")) else "titles" if setting == "titles" else "questions"
        for draw in group:
            file = RECORDS / f"{ON_RECORD.get(setting, setting)}-{draw['draw']}.json"
            on_record = json.loads(file.read_bytes()) if file.exists() else None
            for epochs, now in ((key, value) for key, value in draw.items() if key.startswith("epochs")):
                found = {
                    f"{name}, continued": (of, now["continued"]) for name, of in now.items() if name != "continued"
                }
                if on_record is not None:
                    before, usual = handed_over(on_record)["delivered"], on_record["systems"]["continued"]
                    found |= {f"{name}, before": (now[name], before) for name in ("averaged", "continued")}
                    found["averaged, continued before"] = (now["averaged"], usual)
                counts = epochs == f"epochs {(EPOCHS if kind == 'questions' else EPOCHS_OF_OTHERS)[0]}"
                for what, pair in found.items():
                    pairs.setdefault(f"{epochs}: {what}", []).append(pair)
                    for of in (kind, language, "all") if counts else ():
                        everywhere.setdefault(f"{of}: {what}", []).append(pair)
        articles = draws[[draw["setting"] for draw in draws].index(setting)]["articles"]
        for what, both in pairs.items():
            scores = [[each[side]["test_scores"] for each in both] for side in (0, 1)]
            verdicts = [shown(*pair, articles) for pair in zip(*scores, strict=True)]
            gaps = " ".join(f"{each.difference:+.1f}{'*' * (each.verdict in ('better', 'worse'))}" for each in verdicts)
            rows = shown(*scores, articles)
            yield f"{setting}, {what}: {gaps}; over the test rows {rows.low:+.1f} to {rows.high:+.1f}"
    for what, both in sorted(everywhere.items()):
        gains = [
            interval([fmean(ours[key]) - fmean(theirs[key]) for ours, theirs in both], digits)
            for key, digits in (("test_scores", 1), ("test_losses", 3))
        ]
        yield f"{what}, {len(both)} draws: score {gains[0]}, loss {gains[1]}"


def handed_over(draw: dict[str, Any]) -> dict[str, Any]:
    """What a run handed over of a record with dev rows, with a controller and without, and by the rules before that."""
    systems, questions = draw["systems"], not draw["setting"].startswith(("su", "min", "titles"))
    kept = bool(systems["continued"]["best_step"])  # else the training was discarded
    there = dict.fromkeys(OTHERS, True) | {"continued": kept, "averaged": kept and questions}
    rivals = {name: of for name, of in systems.items() if there.get(name)}
    usual = "averaged" if "averaged" in rivals else "continued" if "continued" in rivals and not questions else "grasp"
    found = {"delivered": systems[usual]}
    if (without := PLAIN if usual == "grasp" else usual + WITHOUT if usual == "averaged" else usual) in systems:
        found[f"delivered{WITHOUT}"] = systems[without]
    candidates = {name: of for name, of in {**rivals, "grasp": systems["grasp"]}.items() if "dev_scores" in of}
    for key, first, left in ((ASKED, usual, ()), (EXPECTED, "grasp", ("averaged",))):
        if first in candidates:
            those = {name: of for name, of in candidates.items() if name not in left}
            scores = {name: of["dev_scores"] for name, of in those.items()}
            losses = {name: fmean(of["dev_losses"]) for name, of in those.items()}
            found[f"delivered{key}"] = those[clearly_ahead(scores, losses, first) or first]
    return found


def shown(ours: Any, theirs: Any, articles: Sequence[int] | None) -> PairedComparison:
    """What the test rows show of two systems, of one draw or of several averaged; rows are drawn by article. Records without
    articles have one row of each."""
    return compare_with_baselines(ours, {"other": theirs}, groups=articles)["other"]


def over(found: Sequence[dict[str, Any]], ours: str, theirs: str, key: str) -> str:
    gaps = [fmean(each[ours][key]) - fmean(each[theirs][key]) for each in found]
    return interval(gaps, 3 if key == "test_losses" else 1)


def interval(gaps: Sequence[float], digits: int) -> str:
    half = student.ppf(0.975, len(gaps) - 1) * stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
    return f"{fmean(gaps):+.{digits}f} ± {half:.{digits}f}"


def main(job: str, *words: str) -> None:
    if job in ("table", "beside"):
        lines = {"table": table, "beside": beside}[job]([json.loads(Path(file).read_bytes()) for file in words])
        sys.stdout.write("\n".join(lines) + "\n")
        return
    assert job == "every", job
    setting, draw, place = words
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    with working_in(folder) as work:
        work.begin(shared=True)
        every(setting, int(draw), folder, work)


if __name__ == "__main__":
    main(*sys.argv[1:])

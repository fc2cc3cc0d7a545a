"""What a person reads of a judgement: the sentence and the table; and its files.

swahili-qa has the highest F1, 61.2. It is shown to be better than english-qa; no difference is shown to the sum.
"""

from pathlib import Path
from typing import Any

from rich.console import Console

from grasp_lora.engine.judge import Judgement
from grasp_lora.engine.results import TEST_LOSS, Prediction
from grasp_lora.evaluation.metrics import metric_title
from grasp_lora.report.examples import differing
from grasp_lora.report.pages import print_table
from grasp_lora.report.tables import Cell, TextTable, column_of, interval_text, percent
from grasp_lora.storage.claims import new_folder
from grasp_lora.storage.writing import write_json, write_jsonl
from grasp_lora.text.display import listed, one_line

FACTS, ANSWERS = "judge.json", "answers.jsonl"
SHOWN = 3  # examples in the terminal
CHARACTERS = 60  # of an answer in the terminal


def sentence(judgement: Judgement) -> str:
    """Which contestant has the best score, and from which others that is shown to set it apart."""
    best, *others = judgement.ranking
    compared = {name: judgement.against(best, name) for name in others}
    beaten = [name for name, comparison in compared.items() if comparison and comparison.verdict == "better"]
    level = [name for name in others if name not in beaten]
    value = judgement.scores[best][judgement.metric]
    alike = [name for name in level if judgement.scores[name][judgement.metric] == value]
    have = "have" if alike else "has"
    text = f"{listed([best, *alike])} {have} the highest {_name(judgement.metric)}, {value:.1f}, on {judgement.examples} rows. "
    if beaten:
        text += f"{best if alike else 'It'} is shown to be better than {listed(beaten)}"
        return text + (f"; no difference is shown to {listed(level)}." if level else ".")
    return text + f"These rows show no difference between {best if alike else 'it'} and {listed(level)}."


def scores_of(judgement: Judgement) -> TextTable:
    """Losses and scores of every contestant, the best first, and by how much the best is ahead of it."""
    names, metric = judgement.ranking, judgement.metric
    metrics = list(judgement.scores[names[0]])
    columns = [[Cell(name) for name in names]]
    for key in metrics:
        values = [judgement.scores[name][key] for name in names]
        columns.append(column_of(values, 3 if key == TEST_LOSS else 1, min if key == TEST_LOSS else max, "unavailable"))
    ahead = [judgement.against(names[0], name) for name in names[1:]]
    texts = ["unavailable" if comparison is None else interval_text(comparison, 1) for comparison in ahead]
    columns.append([Cell("–"), *map(Cell, texts)])
    heads = ["Adapter", *(f"{_name(key)}\u00a0{'↓' if key == TEST_LOSS else '↑'}" for key in metrics)]
    heads.append(f"{_name(metric)}: {names[0]} minus it")
    return TextTable(f"Scores on {judgement.file}", heads, [list(row) for row in zip(*columns, strict=True)])


def how(judgement: Judgement) -> str:
    """Where the intervals come from."""
    drawn = (
        f"in their {judgement.groups} groups of what belongs together"
        if judgement.groups < judgement.examples
        else "one by one"
    )
    pairs = len(judgement.ranking) * (len(judgement.ranking) - 1) // 2
    joint = f"; they hold for all {pairs} pairs at once" if pairs > 1 else ""
    confidence = percent(judgement.pairs[0].comparison.confidence)
    return (
        f"Intervals: paired bootstrap over the {judgement.examples} rows, drawn {drawn}, {confidence}{joint}. They say what "
        "other rows of this kind would show."
    )


def print_judgement(judgement: Judgement, console: Console) -> None:
    """Print tables and sentences, and the rows in which the two best differ most."""
    print_table(scores_of(judgement), console)
    for line in (sentence(judgement), how(judgement)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    pair = {name: judgement.answers[name] for name in judgement.ranking[:2]}
    for question in differing(pair, judgement.prompts, metric=judgement.metric).shown[:SHOWN]:
        console.print(
            f"row {question.number}, expected: {_short(question.references[0])}", markup=False, soft_wrap=True
        )
        for answer in question.answers:
            console.print(f"  {answer.title}: {_short(answer.text)}  {answer.mark}", markup=False, soft_wrap=True)


def write_judgement(judgement: Judgement, folder: Path) -> None:
    """Write JSON and all answers into a folder that does not exist or is empty."""
    with new_folder(folder) as draft:
        write_json(draft / FACTS, judgement.to_json())
        write_jsonl(draft / ANSWERS, _rows(judgement))


def _rows(judgement: Judgement) -> list[dict[str, Any]]:
    """Each row with what each contestant answered."""
    first = next(iter(judgement.answers.values()))
    return [
        {
            "id": row.id,
            "references": list(row.references),
            "answers": {name: _answer(rows[place]) for name, rows in judgement.answers.items()},
        }
        for place, row in enumerate(first)
    ]


def _answer(row: Prediction) -> dict[str, Any]:
    return {"answer": row.prediction, "loss": row.loss, "scores": dict(row.scores)}


def _name(metric: str) -> str:
    return "Loss" if metric == TEST_LOSS else metric_title(metric)


def _short(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= CHARACTERS else f"{line[:CHARACTERS]}…"

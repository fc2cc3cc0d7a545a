"""Prompting as a rival: the nearest rows of a draw stand in the prompt, nothing is trained. The plan is in `lab/log.md`.

    pip install bm25s
    python lab/few_shot.py SETTING DRAW FOLDER    # settings and draws of few_rows.py; FOLDER holds its steps

Needs GRASP_LORA_DATA.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import bm25s
from few_rows import SETTINGS, drawn

from grasp_lora.data.encode import Example
from grasp_lora.engine.check import check
from grasp_lora.engine.results import main_metric
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import Store
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.claims import working_in
from grasp_lora.storage.writing import write_json

SHOTS = (0, 1, 2, 4)
MOST_TESTED = 200  # test rows


def with_shots(test: Sequence[Example], pool: Sequence[Example], shots: int, between: Sequence[int]) -> list[Example]:
    """Put the nearest rows of the pool before each prompt, the nearest last."""
    if not shots:
        return list(test)
    texts = bm25s.tokenize([row.prompt for row in pool], stopwords=None, show_progress=False)
    index = bm25s.BM25()
    index.index(texts, show_progress=False)
    rows = []
    for row in test:
        query = bm25s.tokenize([row.prompt], stopwords=None, show_progress=False)
        nearest, _ = index.retrieve(query, k=shots, show_progress=False)
        before: list[int] = []
        for number in reversed(nearest[0].tolist()):
            shown = pool[number]
            before += [*shown.prompt_ids[1:], *shown.completion_ids[:-1], *between]  # without BOS and EOS
        rows.append(replace(row, prompt_ids=(row.prompt_ids[0], *before, *row.prompt_ids[1:])))
    return rows


def main(setting: str, draw: str, place: str) -> None:
    """Answer the test rows with each number of shots, by the backbone and by the source adapter."""
    name, size, changes = SETTINGS[setting]
    loaded = Session(load_recipe(name, changes)[0], Path.cwd())
    check(loaded)
    splits = drawn(loaded.splits, int(draw), size)
    pool, tokenizer = [*splits.train, *splits.dev], loaded.backbone.tokenizer
    between = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    found: dict[str, Any] = {"setting": setting, "draw": int(draw), "pool": len(pool)}
    folder = Path(place)
    with working_in(folder) as work:
        work.begin(shared=True)
        for shots in SHOTS:
            test = with_shots(splits.test[:MOST_TESTED], pool, shots, between)
            session = loaded.variant(splits=replace(splits, test=tuple(test)))
            steps = Steps(session, Store(folder / "steps", session.progress, work))
            metric = main_metric(list(session.metrics))
            for system, adapter in {"backbone": steps.alone(), "source": steps.source()}.items():
                scores = steps.measure(adapter).metrics[metric].per_example
                found[f"{system}, {shots}"] = [round(float(score), 4) for score in scores]
                sys.stdout.write(f"{system}, {shots} shots: {fmean(scores):.1f}, {len(scores)} test rows\n")
                sys.stdout.flush()
                write_json(folder / f"shots-{setting}-{draw}.json", found)


if __name__ == "__main__":
    main(*sys.argv[1:])

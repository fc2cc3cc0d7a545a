"""Averages of the iterates of a training without a dev set, beside its last ones: draws of `few_rows.py`, all 45 rows.

    python lab/averages.py SETTING DRAW FOLDER      # writes FOLDER/averages-SETTING-DRAW.json

Factors are averaged, A and B each, over the optimizer steps of whole epochs, as in stochastic weight averaging
(arXiv 1803.05407) and in checkpoint averaging for cross-lingual transfer (arXiv 2305.16834). Needs GRASP_LORA_DATA.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from few_rows import COMMON, SETTINGS, drawn, measured
from transformers import TrainerCallback

from grasp_lora.engine.check import check
from grasp_lora.engine.results import Adapter
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import Store, key_of
from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.models.adapters import attached
from grasp_lora.models.live import adapter_weights, segments_of
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.claims import Workplace, working_in
from grasp_lora.storage.writing import write_json
from grasp_lora.training.trainer import finetune

EPOCHS = 5
MEANS = {
    "mean of 2": (2,),
    "mean of 3": (3,),
    "mean of 5": (5,),
    "mean of 2 and 3": (2, 3),
    "mean of 2 to 5": (2, 3, 4, 5),
}
LAST = (1, 2, 3, 5)


def mean_of(several: list[AdapterWeights]) -> AdapterWeights:
    """The mean of each factor."""

    def mean(name: str, pair: LoraPair) -> LoraPair:
        A, B = (torch.stack([getattr(one[name], factor) for one in several]).mean(0) for factor in ("A", "B"))
        return replace(pair, A=A, B=B)

    return AdapterWeights({name: mean(name, pair) for name, pair in several[0].items()})


class Iterates(TrainerCallback):
    """The weights after the last step of each epoch, and their means over its steps."""

    def __init__(self, segments: Any) -> None:
        self.segments, self.last, self.means = segments, [], []
        self.sums: dict[str, tuple[Any, Any]] = {}
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = adapter_weights(kwargs["model"], self.segments)
        for name, pair in now.items():
            before = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = before[0] + pair.A.double(), before[1] + pair.B.double()
        self.steps, self.now = self.steps + 1, now

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def mean(name: str, pair: LoraPair) -> LoraPair:
            A, B = (part / self.steps for part in self.sums[name])
            return replace(pair, A=A.to(pair.A.dtype), B=B.to(pair.B.dtype))

        self.last.append(self.now)
        self.means.append(AdapterWeights({name: mean(name, pair) for name, pair in self.now.items()}))
        self.sums, self.steps = {}, 0


def main(setting: str, draw: int, folder: Path) -> None:
    with working_in(folder) as work:
        work.begin(shared=True)
        _draw(setting, draw, folder, work)


def _draw(setting: str, draw: int, folder: Path, work: Workplace) -> None:
    name, changes = SETTINGS[setting]
    loaded = Session(load_recipe(name, [*COMMON, *changes])[0], Path.cwd())
    check(loaded)
    splits = drawn(loaded.splits, draw)
    rows = replace(splits, train=(*splits.train, *splits.dev), dev=())
    session = loaded.variant(splits=rows)
    steps = Steps(session, Store(folder / "steps", session.progress, work))
    start = steps.source().weights
    training = replace(session.recipe.final.training, epochs=EPOCHS, patience=None, keep="last")
    iterates = Iterates(segments_of(start))
    with attached(session.backbone.model, start, dropout=session.recipe.dropout) as model:
        how: dict[str, Any] = {"pad_id": session.pad_id, "seed": 42, "folder": folder / f"work-{setting}-{draw}"}
        finetune(model, rows.train, (), training, callbacks=[iterates], **how)
    found = {f"last of {epoch}": iterates.last[epoch - 1] for epoch in LAST}
    found |= {name: mean_of([iterates.means[epoch - 1] for epoch in epochs]) for name, epochs in MEANS.items()}
    record: dict[str, Any] = {"setting": setting, "draw": draw, "systems": {}}
    for name, weights in found.items():
        adapter = Adapter(
            key_of("averages", {"setting": setting, "draw": draw, "name": name}), lambda weights=weights: weights
        )
        record["systems"][name] = measured(steps, adapter, on_dev=False)
        write_json(folder / f"averages-{setting}-{draw}.json", record)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))

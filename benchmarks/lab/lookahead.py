"""Which reward ranks prune ratios as the final loss does: the loss at once, or a look ahead?

    python benchmarks/lab/lookahead.py demo-ar --landscape FILE.parquet --folder FOLDER --output ahead.json

A recorded landscape has the loss just after pruning only. Here the same training, with a ratio drawn anew for each step, is run
once more, and at a few moments each ratio is also tried out: the adapter is pruned at it and goes on for a few optimizer steps
with the mask held, then everything is as it was. Each signal is compared with the landscape's final runs, which have to be of
the same recipe. `--folder` may be the landscape's own: adapters that are there are not trained again.
"""

import argparse
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from controllers import spearman, table
from controllers_rivals import Setting
from landscape import Landscape
from smoothing import smooth
from trajectory import LossLandscape
from transformers import TrainerControl, TrainerState, TrainingArguments

from grasp_lora.bench.checks import check
from grasp_lora.bench.run_folder import STORE_FOLDER
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import Store
from grasp_lora.errors import GraspError
from grasp_lora.method.ranking import Ranking, WeightKey
from grasp_lora.models.adapters import attached
from grasp_lora.models.backbone import supports_logits_to_keep
from grasp_lora.models.live import evaluating, segments_of
from grasp_lora.recipes.load import load_recipe
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.storage.folder import working_in
from grasp_lora.training.probes import ProbeSet, example_losses

RATIOS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8)


class LookAhead(LossLandscape):
    """A shared landscape in which each ratio is also tried out for a few steps at every measurement.

    After training, beside `steps` and `losses`: `ahead` with the losses after the masked steps, [measurements][ratios][examples],
    and `slopes` with the change of the mean loss that one step promises to first order, [measurements][ratios].

    Args:
        micro_dev: the examples that are measured.
        ratios: fractions in [0, 1].
        every: optimizer steps between measurements.
        batches: a training batch for each step ahead, the same for every ratio.
        segments: as of `LossLandscape`.
    """

    def __init__(
        self, micro_dev: ProbeSet, ratios: Sequence[float], every: int, batches: Sequence[ProbeSet], segments: Any
    ) -> None:
        super().__init__(micro_dev, ratios, every, None, segments=segments)
        self.batches = list(batches)
        self.ahead: list[list[list[float]]] = []
        self.slopes: list[list[float]] = []
        self._optimizer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the optimizer, too."""
        self._optimizer = kwargs["optimizer"]
        super().on_train_begin(args, state, control, **kwargs)

    def _measure(self, model: torch.nn.Module, step: int, ranking: Ranking) -> None:
        super()._measure(model, step, ranking)
        ahead, slopes = [], []
        for ratio in self.ratios:
            keep = self.masks.keep_masks(ratio, ranking)
            with self.masks.probe(ratio, ranking):
                slopes.append(self._slope(model, keep))
            with self.masks.probe(ratio, ranking):
                ahead.append(self._after_steps(model, keep))
        self.ahead.append(ahead)
        self.slopes.append(slopes)

    def _slope(self, model: torch.nn.Module, keep: Mapping[WeightKey, torch.Tensor]) -> float:
        """The micro-dev gradient times what one optimizer step would move, on all batches together."""
        weights = self.masks.weights
        with _SameOptimizer(self._optimizer):
            before = {key: weight.detach().clone() for key, weight in weights.items()}
            for batch in self.batches:
                add_gradients(model, batch)
            for weight in weights.values():
                _gradient(weight).div_(len(self.batches))
            self._step(keep)
            moved = {key: weight.detach() - before[key] for key, weight in weights.items()}
            with torch.no_grad():
                for key, weight in weights.items():
                    weight.copy_(before[key])
            add_gradients(model, self.calibration)
            return sum(float((_gradient(weight) * moved[key]).sum()) for key, weight in weights.items())

    def _after_steps(self, model: torch.nn.Module, keep: Mapping[WeightKey, torch.Tensor]) -> list[float]:
        with _SameOptimizer(self._optimizer):
            for batch in self.batches:
                add_gradients(model, batch)
                self._step(keep)
            return self.calibration.losses(model)

    def _step(self, keep: Mapping[WeightKey, torch.Tensor]) -> None:
        """An optimizer step that leaves masked weights at zero; gradients are gone afterwards."""
        for key, weight in self.masks.weights.items():
            _gradient(weight).masked_fill_(~keep[key], 0.0)
        self._optimizer.step()
        with torch.no_grad():
            for key, weight in self.masks.weights.items():
                weight.masked_fill_(~keep[key], 0.0)
        self._optimizer.zero_grad()


def add_gradients(model: torch.nn.Module, examples: ProbeSet) -> None:
    """Add the gradients of the mean loss to the parameters' `.grad`, in eval mode."""
    with evaluating(model):
        for _, batch in examples.batches():
            losses = example_losses(model, batch, label_positions=supports_logits_to_keep(model))
            (losses.sum() / len(examples)).backward()


def _gradient(weight: torch.Tensor) -> torch.Tensor:
    assert weight.grad is not None, "there was no backward pass"
    return weight.grad


class _SameOptimizer:
    """Gives the optimizer its state back at the end; gradients are gone before and after."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def __enter__(self) -> None:
        self.state = copy.deepcopy(self.optimizer.state_dict())
        self.optimizer.zero_grad()

    def __exit__(self, *error: Any) -> None:
        self.optimizer.zero_grad()
        self.optimizer.load_state_dict(self.state)


def look_ahead(
    recipe: Recipe, base: Path, folder: Path, ratios: Sequence[float], every: int, ahead: int
) -> dict[str, Any]:
    """Train once with shared ratios and measure all signals.

    Args:
        recipe: whose controller's training is run.
        base: folder that the recipe's files are relative to.
        folder: for the records of the adapters.
        ratios: what is tried out, fractions in [0, 1].
        every: optimizer steps between measurements.
        ahead: masked steps of a look ahead, each on a batch of the recipe's size.

    Raises:
        GraspError: the recipe or the data does not fit, or there are too few training examples to look ahead.
    """
    session = Session(recipe, base)
    check(session)
    training, train = recipe.controller.training, session.splits.train
    size = training.batch_size * training.accumulation
    if ahead * size > len(train):
        raise GraspError(f"{ahead} steps ahead need {ahead * size} training examples; there are {len(train)}")
    with working_in(folder) as place:
        place.begin()
        merged = Bench(session, session, Store(folder / STORE_FOLDER)).merged().load()
        assert merged is not None
        micro_dev = ProbeSet(session.splits.micro_dev, session.pad_id)
        batches = [ProbeSet(train[size * n : size * (n + 1)], session.pad_id) for n in range(ahead)]
        measured = LookAhead(micro_dev, ratios, every, batches, segments_of(merged))
        with attached(session.backbone.model, merged, dropout=recipe.dropout) as model:
            session.finetune(model, train, (), training, "controller", folder / "look-ahead", callbacks=[measured])
    return {
        "steps": measured.steps,
        "ratios": list(ratios),
        "ahead": ahead,
        "steps_per_epoch": training.steps_per_epoch(len(train)),
        "immediate": np.mean(measured.losses, axis=2).tolist(),
        "after_steps": np.mean(measured.ahead, axis=2).tolist(),
        "slope": measured.slopes,
    }


def signals_of(measured: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every signal: name -> [measurements, ratios]. Looks ahead to first order go as far as the masked steps, and an epoch."""
    immediate, slope = np.array(measured["immediate"]), np.array(measured["slope"])
    ahead, epoch = measured["ahead"], measured["steps_per_epoch"]
    return {
        "immediate": immediate,
        f"after {ahead} masked steps": np.array(measured["after_steps"]),
        f"first order, {ahead} steps": immediate + ahead * slope,
        f"first order, {epoch} steps": immediate + epoch * slope,
    }


def judged(measured: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """Rank correlation with the final dev loss, ratio and its regret in percent: signal -> measure -> list over moments."""
    ratios = measured["ratios"]
    final = [setting.landscape.final_loss(ratio, "dev") for ratio in ratios]
    found = {}
    for name, values in signals_of(measured).items():
        chosen = [smooth(ratios, row, setting.low, setting.high).ratio for row in values]
        found[name] = {
            "spearman": [spearman(row, final) for row in values],
            "ratio": chosen,
            "regret_percent": [setting.regret(ratio, "dev", "smooth") for ratio in chosen],
        }
    return found


def report(measured: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The table: rank correlation / chosen ratio / regret by moment."""
    rows = [
        [
            name,
            *(
                f"{correlation:+.2f} / {ratio:.2f} / {regret:.1f} %"
                for correlation, ratio, regret in zip(one["spearman"], one["ratio"], one["regret_percent"], strict=True)
            ),
        ]
        for name, one in found.items()
    ]
    return table(["rank correlation / ratio / regret", *(f"step {step}" for step in measured["steps"])], rows)


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="a.b=value, of the recipe")
    parser.add_argument("--landscape", type=Path, required=True, help="with the final runs of the same recipe")
    parser.add_argument("--folder", type=Path, required=True, help="for the adapters and their records")
    parser.add_argument("--ratios", default=",".join(map(str, RATIOS)), help="fractions in [0, 1]")
    parser.add_argument("--every", type=int, default=32, help="optimizer steps between measurements")
    parser.add_argument("--ahead", type=int, default=4, help="masked steps of a look ahead")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    options = parser.parse_args(given)
    try:
        setting = Setting(options.recipe, Landscape.load(options.landscape))
        recipe, base = load_recipe(options.recipe, options.overrides)
        ratios = sorted(float(ratio) for ratio in options.ratios.split(","))
        smooth(ratios, ratios, setting.low, setting.high)  # raises now, not after the training, where they are too few
        measured = look_ahead(recipe, base, options.folder, ratios, options.every, options.ahead)
    except (GraspError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    found = judged(measured, setting)
    sys.stdout.write(report(measured, found) + "\n")
    if options.output:
        options.output.write_text(
            json.dumps({"measured": measured, "judged": found}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`final.all_rows`: what a run hands over, trained once more on the target's train, dev and micro-dev rows together.

The choice, the learned ratio and the epochs of each training come from the run, so no row is left to stop by: a training goes to
its end and keeps its last step. Where a first training was discarded (best step 0), so is this one. The test stays out. As many
optimizer steps, which are fewer epochs of more rows, were measured and answered worse (`lab/log.md`).
"""

from dataclasses import asdict, replace

import torch

from grasp_lora.engine.results import Adapter
from grasp_lora.engine.run_folder import AllRows
from grasp_lora.engine.steps import CALIBRATION_EXAMPLES, Parents, Steps
from grasp_lora.engine.store import key_of
from grasp_lora.errors import AdapterError, DivergedError, ProbeError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.masks import MaskSet
from grasp_lora.models.adapters import attached
from grasp_lora.models.live import adapter_weights, live_pairs, segments_of
from grasp_lora.training.probes import ProbeSet, calibrate
from grasp_lora.training.training_settings import TrainingSettings


def train_again(
    steps: Steps, parents: Parents, name: str, chosen: Adapter, prune_ratio: float
) -> tuple[AllRows, Adapter | None, Steps]:
    """Train a system of a run once more on all rows outside the test set, with what it rests on and was trained on such rows.

    Args:
        steps: of the run.
        parents: the adapters that were merged.
        name: the system: source, source_2, ..., target, merged, continued or grasp.
        chosen: its adapter.
        prune_ratio: of GRASP's result, a fraction in [0, 1].

    Returns:
        What became of it, the adapter, and the steps that measure it. The adapter is None where nothing was trained, or where
        that failed: then the chosen one stays.
    """
    recipe, splits, kind = steps.recipe, steps.splits, name.partition("_")[0]
    trained: dict[str, tuple[Adapter, TrainingSettings]] = {}
    if kind in ("target", "merged", "grasp") and recipe.target.adapter is None:
        trained["target"] = parents.target, recipe.target.training
    if kind in ("continued", "grasp"):
        trained[kind] = chosen, recipe.final.training
    counts = {part: adapter.made.result.best_step if adapter.made else 0 for part, (adapter, _) in trained.items()}
    rows = len(splits.train) + len(splits.dev) + len(splits.micro_dev)
    nothing = ""
    if rows == len(splits.train):
        nothing = "there are no dev and micro-dev rows"
    elif not trained:
        nothing = "no part of it was trained on target rows in this run"
    elif not any(counts.values()):
        nothing = "its training was discarded (best step 0)"
    if nothing:
        return AllRows(f"There is nothing to train once more on all rows: {nothing}."), None, steps
    epochs = {
        part: counts[part] / training.steps_per_epoch(len(splits.train)) for part, (_, training) in trained.items()
    }
    again = steps.on_all_rows(epochs.get("target", 0.0), epochs.get("continued", epochs.get("grasp", 0.0)))
    try:
        adapter = _made_again(again, parents, kind, prune_ratio, counts)
    except (DivergedError, ProbeError, AdapterError) as error:
        return AllRows(f"What was chosen could not be trained once more on all rows: {error}"), None, steps
    lengths = " and ".join(f"{part} {count:.3g}" for part, count in epochs.items() if count)
    why = (
        f"The choice was made with {len(splits.train)} training rows. What was chosen was then trained once more on all {rows} "
        f"rows outside the test set (epochs: {lengths}), and that adapter is handed over."
    )
    lasting = {
        part: replace(training, epochs=epochs[part]).steps(rows) if epochs[part] else 0
        for part, (_, training) in trained.items()
    }
    return AllRows(why, rows, lasting), adapter, again


def _made_again(again: Steps, parents: Parents, kind: str, prune_ratio: float, counts: dict[str, int]) -> Adapter:
    """What was chosen, made once more; a part that was not trained in the run is taken as it is."""
    if kind == "continued":
        return again.continued()
    target = parents.target
    if counts.get("target"):
        target = again.target(again.source() if parents.on else None)
    if kind == "target":
        return target
    merged = again.merge_of(parents.sources, target, parents.on)
    if kind == "merged":
        return merged
    if counts["grasp"]:
        return again.finetune(merged, prune_ratio)
    mask = again.recipe.final.mask or again.recipe.mask
    key = key_of("pruned", {"merged": merged.key, "prune_ratio": prune_ratio, "mask": asdict(mask)})
    return replace(merged, key=key, load=lambda: _pruned(again, merged, prune_ratio))


def _pruned(steps: Steps, start: Adapter, prune_ratio: float) -> AdapterWeights:
    """An adapter as the final run has it before its first step."""
    session, weights = steps.session, start.weights
    segments = segments_of(weights)
    with attached(session.backbone.model, weights) as model, torch.no_grad():
        masks = MaskSet(live_pairs(model, segments), steps.recipe.final.mask or steps.recipe.mask)
        calibrate(model, masks, ProbeSet(steps.splits.train[:CALIBRATION_EXAMPLES], session.pad_id))
        masks.commit(prune_ratio)
        return adapter_weights(model, segments)

"""Grids whose runs train side by side: a method of the comparison, and the controller of preset `stacked`."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from grasp_lora.bench.outcomes import measured_examples, trained_examples
from grasp_lora.bench.session import CALIBRATION_EXAMPLES, ControllerRun, Session
from grasp_lora.errors import DivergedError, GraspError, ProbeError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.presets import ratio_rule
from grasp_lora.method.rounds import Round
from grasp_lora.method.search import RatioSearch
from grasp_lora.storage.files import write_jsonl
from grasp_lora.training.probes import ProbeSet
from grasp_lora.training.settings import TrainingSettings

if TYPE_CHECKING:  # it brings transformers' Trainer, which takes a second to import
    from grasp_lora.training.stacked import Member


def train_grid(
    session: Session, start: AdapterWeights, ratios: Sequence[float]
) -> tuple[AdapterWeights, dict[str, Any]]:
    """Do the final runs of a grid side by side; return the adapter of the lowest dev loss, and what all of them did and cost.

    Each run takes the steps of `Session.finetune_pruned`, and without dropout its result, up to rounding.

    Raises:
        GraspError: every run diverged, or adapters cannot be stacked here.
    """
    from grasp_lora.training.stacked import members_of

    recipe, train = session.recipe, session.splits.train
    training = recipe.final.training
    calibration = ProbeSet(train[:CALIBRATION_EXAMPLES], session.pad_id)
    seeds, mask = [recipe.seed_of("final order")], recipe.final.mask or recipe.mask
    members = members_of(session.backbone.model, start, ratios, seeds, calibration, mask)
    _train(session, members, ProbeSet(session.splits.dev, session.pad_id), training)
    sound = [one for one in members if one.failed is None]
    if not sound:
        raise DivergedError(f"every stacked run failed; that of prune ratio {ratios[0]:g}: {members[0].failed}")
    best = min(sound, key=lambda one: one.dev_loss)
    facts = {
        "prune_ratio": best.prune_ratio,
        "steps": best.steps,
        "best_step": best.best_step,
        "dev_loss": best.dev_loss,
        "history": best.history,
        "members": [
            {
                "prune_ratio": one.prune_ratio,
                "dev_loss": None if one.failed else one.dev_loss,
                "best_step": one.best_step,
                "failed": one.failed,
            }
            for one in members
        ],
    }
    return best.weights, facts | _cost(members, training, len(train), len(session.splits.dev))


def learn_stacked(session: Session, merged: AdapterWeights, folder: Path) -> ControllerRun:
    """Learn the ratio from copies of the merge that train side by side, one or more at each ratio.

    A round measures all copies. One that was halved away counts with its last losses.

    Raises:
        ProbeError: a loss is not finite.
    """
    from grasp_lora.training.controller import ROUNDS_FILE, TIMINGS_FILE
    from grasp_lora.training.stacked import members_of

    recipe, stage, pool = session.recipe, session.recipe.controller, session.probe_pool
    policy = replace(stage.policy, seed=recipe.seed_of(f"policy {stage.policy.seed}"))
    search, probes = RatioSearch(policy, ratio_rule(stage.rule)), ProbeSet(pool, session.pad_id)
    ratios, orders = search.ask(), stage.policy.copies // stage.policy.candidates
    seeds = [recipe.seed_of("controller order" + (f" {number}" if number else "")) for number in range(orders)]
    members = members_of(session.backbone.model, merged, ratios, seeds, probes, recipe.mask)
    latest: dict[int, list[float]] = {}
    rows: list[dict[str, Any]] = []
    timings: list[dict[str, Any]] = []
    per_epoch, began = stage.training.steps_per_epoch(len(session.splits.train)), time.perf_counter()

    def check_all_go_on() -> None:
        for one in members:
            if one.failed is not None:
                raise ProbeError(f"the run at prune ratio {one.prune_ratio:.4f}: {one.failed}")

    def told(step: int, losses: Mapping[int, list[float]]) -> bool:
        nonlocal began
        check_all_go_on()
        latest.update(losses)
        by_ratio = [
            list(map(fmean, zip(*(latest[place * orders + number] for number in range(orders)), strict=True)))
            for place in range(len(ratios))
        ]
        before = search.current_ratio
        baseline = by_ratio[_place(before, ratios)]
        measured = Round(before, tuple(ratios), tuple(baseline), tuple(map(tuple, by_ratio)))
        decision = search.tell(measured)
        sparsity = float((~members[_place(decision.ratio, ratios) * orders].keep).double().mean())
        place = {"round": len(search.history), "step": step, "epoch": step / per_epoch}
        rows.append(place | dict(decision.to_json(measured, search.mean, search.std, sparsity)))
        now = time.perf_counter()
        timings.append({"round": len(rows), "step": step, "probe_seconds": 0.0, "train_seconds": now - began})
        began = now
        session.progress.round(rows[-1])
        patience = stage.rounds.patience
        return patience is not None and search.rounds_since_best >= patience

    steps = stage.round_steps(len(session.splits.train))
    taken = _train(
        session,
        members,
        probes,
        stage.training,
        measured_after=set(steps).__contains__,
        halve=getattr(stage.policy, "halve", False),
        on_measured=told,
    )
    check_all_go_on()  # where all failed at once, nothing was told
    for name, content in ((ROUNDS_FILE, rows), (TIMINGS_FILE, timings)):
        write_jsonl(folder / name, content)
    cost = _cost(members, stage.training, len(session.splits.train), len(pool))
    return ControllerRun(search.best_ratio(), merged, taken, rows, timings, [], cost)


def _train(
    session: Session, members: "Sequence[Member]", dev: ProbeSet, training: TrainingSettings, **options: Any
) -> int:
    from grasp_lora.training.stacked import train_stacked

    if session.checkpoints is not None:
        options["stop_requested"] = session.checkpoints.stop_requested
    return train_stacked(
        session.backbone.model,
        members,
        session.splits.train,
        dev,
        training,
        pad_id=session.pad_id,
        dropout=session.recipe.dropout,
        on_step=session.progress.step,
        **options,
    )


def _place(ratio: float, ratios: Sequence[float]) -> int:
    """Where a policy's ratio stands among the stacked ones."""
    if ratio not in ratios:
        raise GraspError(
            f"the policy's current ratio {ratio} is not among the stacked ones ({', '.join(map(str, ratios))}), so nothing was "
            "measured at it; let draw give the same ratios each time, and decide one of them"
        )
    return ratios.index(ratio)


def _cost(members: "Sequence[Member]", training: TrainingSettings, train: int, measured: int) -> dict[str, int]:
    """Examples that all members trained on and measured."""
    return {
        "trained_examples": sum(trained_examples(one.steps, training, train) for one in members),
        "measured_examples": sum(measured_examples(one.history, measured) for one in members),
    }

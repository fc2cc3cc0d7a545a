"""A landscape is measured along a training without a trace, and a shared one favours no ratio."""

import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from trajectory import LossLandscape
from transformers import TrainerCallback, TrainerState

from grasp_lora.errors import GraspError, ProbeError
from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.method.masks import SCORES, MaskSet, MaskSettings
from grasp_lora.method.merging import MergeSettings, merge
from grasp_lora.method.search import even_ratio
from grasp_lora.models.adapters import attached, fresh_adapter
from grasp_lora.models.live import live_pairs, segments_of
from grasp_lora.models.settings import LoraSettings
from grasp_lora.storage.checkpoints import Checkpointing
from grasp_lora.training import probes as probing
from grasp_lora.training.probes import ProbeSet
from grasp_lora.training.pruned import PrunedTraining
from grasp_lora.training.settings import TrainingSettings
from grasp_lora.training.trainer import finetune

RATIOS = (0.1, 0.5, 0.9)
STEPS = 12


@dataclass(frozen=True)
class Example:
    id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


def examples(count: int, seed: int) -> list[Example]:
    draw = random.Random(seed)
    return [
        Example(f"e{i}", tuple(draw.randrange(4, 260) for _ in range(5)), (draw.randrange(4, 260), 2))
        for i in range(count)
    ]


MICRO_DEV = ProbeSet(examples(4, 1), 0)


@pytest.fixture(scope="module")
def model(make_tiny_model):
    return make_tiny_model("llama")


@pytest.fixture(scope="module")
def merged(model) -> AdapterWeights:
    """A source of rank 3 and a target of rank 2, merged; every weight is away from zero."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for rank in (3, 2):
        with fresh_adapter(model, LoraSettings(rank=rank, target_modules=("q_proj", "v_proj")), seed=rank) as adapter:
            shapes = {name: (pair.A.shape, pair.B.shape) for name, pair in live_pairs(adapter).items()}
        parts.append(
            AdapterWeights(
                {
                    name: LoraPair(*(0.3 * torch.randn(shape, generator=generator) for shape in pair))
                    for name, pair in shapes.items()
                }
            )
        )
    return merge(parts, MergeSettings())


def train(
    model: Any,
    merged: AdapterWeights,
    folder: Path,
    *callbacks: TrainerCallback,
    checkpoints: Checkpointing | None = None,
    epochs: float = 1,
) -> torch.Tensor:
    """Train with dropout; return all weights in one vector."""
    settings = TrainingSettings(epochs=epochs, learning_rate=1e-2, patience=None)
    with attached(model, merged, dropout=0.1) as live:
        finetune(
            live,
            examples(STEPS, 0),
            (),
            settings,
            pad_id=0,
            seed=1,
            folder=folder,
            callbacks=callbacks,
            checkpoints=checkpoints,
        )
        return flat(live)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([factor.detach().flatten() for pair in live_pairs(model).values() for factor in (pair.A, pair.B)])


def landscape(merged: AdapterWeights, prune_ratio: float | None, every: int = 4, **mask: str) -> LossLandscape:
    return LossLandscape(MICRO_DEV, RATIOS, every, prune_ratio, MaskSettings(**mask), segments_of(merged))


class Watch(TrainerCallback):
    """Notes ratio and mask after each step; it comes after the landscape."""

    def __init__(self, watched: LossLandscape) -> None:
        self.watched = watched
        self.ratios: list[float] = []
        self.kept: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        masks = self.watched.masks
        self.ratios.append(masks.ratio)
        self.kept.append(torch.cat([keep.flatten() for keep in masks.keep.values()]))
        assert all((masks.weights[key][~keep] == 0).all() for key, keep in masks.keep.items())


@pytest.mark.parametrize("score", SCORES)
def test_measurements_leave_no_trace_in_the_training(model, merged, tmp_path, score):
    mask = MaskSettings(score)
    plain = train(model, merged, tmp_path, PrunedTraining(0.4, MICRO_DEV, mask, "hold", segments_of(merged)))
    measured = landscape(merged, 0.4, every=1, score=score)
    assert torch.equal(train(model, merged, tmp_path, measured), plain)
    assert measured.steps == list(range(STEPS + 1))


@pytest.mark.parametrize("prune_ratio", [0.4, None])
def test_weights_and_masks_after_a_measurement_are_bit_for_bit_those_before(
    model, merged, tmp_path, monkeypatch, prune_ratio
):
    measure = LossLandscape._measure
    same = []

    def watched(self: LossLandscape, live: torch.nn.Module, *rest: Any) -> None:
        weights, kept = flat(live), torch.cat([keep.flatten() for keep in self.masks.keep.values()])
        measure(self, live, *rest)
        same.append(torch.equal(flat(live), weights))
        same.append(torch.equal(torch.cat([keep.flatten() for keep in self.masks.keep.values()]), kept))

    monkeypatch.setattr(LossLandscape, "_measure", watched)
    train(model, merged, tmp_path, landscape(merged, prune_ratio))
    assert len(same) == 8
    assert all(same)


def test_it_measures_before_training_when_it_is_due_and_at_the_end(model, merged, tmp_path):
    measured = landscape(merged, 0.0, every=5)
    train(model, merged, tmp_path, measured)
    assert measured.steps == [0, 5, 10, 12]
    assert [[len(losses) for losses in row] for row in measured.losses] == [[4] * len(RATIOS)] * 4
    train(model, merged, tmp_path, measured)
    assert measured.steps == [0, 5, 10, 12]


@pytest.mark.parametrize("score", ["magnitude", "input_aware"])
def test_before_training_it_does_not_matter_which_mask_will_be_held(model, merged, tmp_path, score):
    runs = [landscape(merged, ratio, score=score) for ratio in (0.0, 0.4, 0.7, None)]
    for run in runs:
        train(model, merged, tmp_path, run)
    assert all(run.losses[0] == runs[0].losses[0] for run in runs)
    assert len({str(run.losses[-1]) for run in runs}) == len(runs)


def test_what_it_measures_is_the_loss_of_the_adapter_pruned_at_that_ratio(model, merged, tmp_path):
    measured = landscape(merged, 0.0)
    train(model, merged, tmp_path, measured)
    for ratio, losses in zip(RATIOS, measured.losses[0], strict=True):
        with attached(model, merged) as live:
            MaskSet(live_pairs(live, segments_of(merged)), MaskSettings()).commit(ratio)
            assert MICRO_DEV.losses(live) == losses


def test_a_shared_run_visits_ratios_from_all_over_the_grid_with_masks_that_nest(model, merged, tmp_path):
    measured = landscape(merged, None)
    watch = Watch(measured)
    train(model, merged, tmp_path, measured, watch, epochs=3)
    assert len(set(watch.ratios)) == len(watch.ratios) == 3 * STEPS
    ordered = sorted(watch.ratios)
    assert 0.1 <= ordered[0] < 0.15
    assert 0.85 < ordered[-1] <= 0.9
    assert max(b - a for a, b in pairwise(ordered)) < 0.05
    by_ratio = [kept for _, kept in sorted(zip(watch.ratios, watch.kept, strict=True), key=lambda pair: -pair[0])]
    assert all((low | ~high).all() for high, low in pairwise(by_ratio))
    assert not torch.equal(by_ratio[0], by_ratio[-1])


def test_any_stretch_of_a_shared_run_covers_the_range_evenly():
    for start in (0, 17, 400):
        ratios = [even_ratio(step, 0.0, 0.8) for step in range(start, start + 25)]
        assert all(0.0 <= ratio < 0.8 for ratio in ratios)
        assert sum(ratios) / len(ratios) == pytest.approx(0.4, abs=0.03)
        tenths = [sum(0.08 * i <= ratio < 0.08 * (i + 1) for ratio in ratios) for i in range(10)]
        assert min(tenths) >= 1
        assert max(tenths) <= 4


def test_a_training_that_resumes_is_refused(model, merged, tmp_path):
    train(model, merged, tmp_path, landscape(merged, 0.4), checkpoints=Checkpointing(5))
    with pytest.raises(GraspError, match="recorded in one go, but training resumes at step 10; start it anew"):
        train(model, merged, tmp_path, landscape(merged, 0.4), checkpoints=Checkpointing(5))


def test_a_loss_that_is_not_finite_says_at_which_ratio_and_step(model, merged, tmp_path, monkeypatch):
    measure = probing.example_losses
    calls = 0

    def overflow(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        losses = measure(*args, **kwargs)
        calls += not torch.is_grad_enabled()
        return losses * float("nan") if calls == len(RATIOS) + 2 else losses

    monkeypatch.setattr(probing, "example_losses", overflow)
    with pytest.raises(ProbeError, match=r"prune ratio 0\.5000 after 4 steps: the loss of example e\d is nan"):
        train(model, merged, tmp_path, landscape(merged, 0.0))


@pytest.mark.parametrize(("ratios", "every", "message"), [((), 1, "no ratios"), ((0.5,), 0, "every is 0")])
def test_what_makes_no_sense_is_refused(ratios, every, message):
    with pytest.raises(ValueError, match=message):
        LossLandscape(MICRO_DEV, ratios, every, 0.4)

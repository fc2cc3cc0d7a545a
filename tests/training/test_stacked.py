"""Adapters that train side by side take the very steps that each would take alone."""

import math
from dataclasses import replace

import pytest
import torch
from random_examples import TARGETS, make_examples, random_like

from grasp_lora.errors import GraspError, Interrupted
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.method.masks import MaskSettings
from grasp_lora.method.merging import MergeSettings, merge
from grasp_lora.models.adapters import attached, fresh_adapter
from grasp_lora.models.live import adapter_weights, live_pairs, segments_of
from grasp_lora.models.settings import LoraSettings
from grasp_lora.training.finetune import finetune
from grasp_lora.training.probes import ProbeSet
from grasp_lora.training.pruned import PrunedTraining
from grasp_lora.training.settings import TrainingSettings
from grasp_lora.training.stacked import Member, Stack, members_of, train_stacked

PAD = 0
TRAIN, DEV, PROBES = make_examples(11, seed=1), make_examples(5, seed=2), make_examples(4, seed=3)
RATIOS, SEEDS = (0.0, 0.3, 0.7), (1, 2)
TRAINING = TrainingSettings(epochs=3, learning_rate=3e-2, patience=2, max_grad_norm=0.5, evaluate_every=0.5)


def start_on(backbone, architecture: str, rule: str = "exact") -> AdapterWeights:
    generator = torch.Generator().manual_seed(5)
    parts = []
    for seed in (1, 2):
        with fresh_adapter(backbone, LoraSettings(rank=2, target_modules=TARGETS[architecture]), seed) as model:
            parts.append(random_like(model, generator, 0.3, scaling=2.0))
    return merge(parts, MergeSettings(rule))


def in_double(weights: AdapterWeights) -> AdapterWeights:
    return AdapterWeights({n: replace(pair, A=pair.A.double(), B=pair.B.double()) for n, pair in weights.items()})


def alone(backbone, start, ratio, seed, mask, settings, folder):
    """One run of a grid: the adapter, and what the fine-tune says of itself."""
    pruned = PrunedTraining(ratio, ProbeSet(PROBES, PAD), mask, "hold", segments_of(start))
    with attached(backbone, start) as model:
        model.double()
        result = finetune(model, TRAIN, DEV, settings, pad_id=PAD, seed=seed, folder=folder, callbacks=[pruned])
        pairs = {n: replace(p, A=p.A.detach().clone(), B=p.B.detach().clone()) for n, p in live_pairs(model).items()}
        return pairs, result


def stacked(backbone, start, ratios, seeds, mask, settings, **options) -> list[Member]:
    members = members_of(backbone, start, ratios, seeds, ProbeSet(PROBES, PAD), mask)
    members = [replace(one, weights=in_double(one.weights)) for one in members]
    train_stacked(backbone, members, TRAIN, ProbeSet(DEV, PAD), settings, pad_id=PAD, **options)
    return members


@pytest.mark.parametrize(
    ("architecture", "rule", "mask", "changes"),
    [
        ("llama", "exact", MaskSettings(), {}),
        ("gemma3", "exact", MaskSettings("input_aware"), {"batch_size": 2, "accumulation": 2}),
        ("gpt2", "exact", MaskSettings(), {"weight_decay": 0.1}),
        ("llama", "paper_apart", MaskSettings("gradient_of_delta"), {"max_grad_norm": 0.0}),
        ("llama", "exact", MaskSettings(), {"keep": "last", "patience": None, "epochs": 1.5}),
        ("llama", "exact", MaskSettings(), {"keep": "last", "patience": 3, "epochs": 8}),
    ],
)
def test_members_equal_separate_runs(make_tiny_model, tmp_path, architecture, rule, mask, changes):
    backbone, settings = make_tiny_model(architecture).requires_grad_(False), replace(TRAINING, **changes)
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):  # GPT-2's own
            module.p = 0.0
    start = start_on(backbone, architecture, rule)
    start = AdapterWeights({name: start[name] for name in reversed(list(start))})  # as a file may have them
    backbone.double()
    members = stacked(backbone, start, RATIOS, SEEDS, mask, settings)
    ended = set()
    for place, one in enumerate(members):
        assert (one.prune_ratio, one.seed) == (RATIOS[place // 2], SEEDS[place % 2])
        pairs, result = alone(backbone, start, one.prune_ratio, one.seed, mask, settings, tmp_path / str(place))
        dev = [row for row in result.history if "dev_loss" in row]
        assert [row["step"] for row in one.history] == [row["step"] for row in dev]
        assert [row["epoch"] for row in one.history] == pytest.approx([row["epoch"] for row in dev])
        for mine, other in zip(one.history, dev, strict=True):
            assert mine["dev_loss"] == pytest.approx(other["dev_loss"], abs=1e-6)
        assert (one.steps, one.best_step) == (result.steps, result.best_step)
        assert one.dev_loss == pytest.approx(result.dev_loss, abs=1e-6)
        ended.add(one.steps)
        for name, pair in one.weights.items():
            assert pair.segments == start[name].segments
            assert pair.apart == start[name].apart
            for mine, other in ((pair.A, pairs[name].A), (pair.B, pairs[name].B)):
                torch.testing.assert_close(mine.double(), other.float().double(), rtol=0, atol=1e-6)
                assert torch.equal(mine == 0, other == 0)
    if settings.patience is not None:
        assert len(ended) > 1  # some stopped before the others


def test_in_float32_members_equal_separate_runs_to_rounding(make_tiny_model, tmp_path):
    backbone = make_tiny_model("llama").requires_grad_(False)
    start, settings = start_on(backbone, "llama"), replace(TRAINING, learning_rate=1e-3)
    members = members_of(backbone, start, (0.3,), (1,), ProbeSet(PROBES, PAD), MaskSettings())
    train_stacked(backbone, members, TRAIN, ProbeSet(DEV, PAD), settings, pad_id=PAD)
    pruned = PrunedTraining(0.3, ProbeSet(PROBES, PAD), segments=segments_of(start))
    with attached(backbone, start) as model:
        finetune(model, TRAIN, DEV, settings, pad_id=PAD, seed=1, folder=tmp_path, callbacks=[pruned])
        for name, pair in adapter_weights(model).items():
            torch.testing.assert_close(members[0].weights[name].A, pair.A, rtol=0, atol=1e-4)


def test_the_backbone_is_left_as_it_was(make_tiny_model):
    backbone = make_tiny_model("llama").requires_grad_(False)
    start, before = start_on(backbone, "llama"), {k: v.clone() for k, v in backbone.state_dict().items()}
    inputs = torch.tensor([[5, 6, 7]])
    logits = backbone(inputs).logits
    members = members_of(backbone, start, RATIOS, (1,), ProbeSet(PROBES, PAD), MaskSettings())
    train_stacked(backbone, members, TRAIN, ProbeSet(DEV, PAD), TRAINING, pad_id=PAD, dropout=0.3)
    assert not backbone.training
    assert torch.equal(backbone(inputs).logits, logits)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_halving_lets_the_better_half_go_on(make_tiny_model):
    backbone = make_tiny_model("llama").requires_grad_(False)
    start = start_on(backbone, "llama")
    ratios = (0.0, 0.2, 0.4, 0.6, 0.95)
    settings = replace(TRAINING, patience=None, evaluate_every=1.0, learning_rate=1e-3)
    backbone.double()
    whole, halved = (
        stacked(backbone, start, ratios, (1,), MaskSettings(), settings, halve=one) for one in (False, True)
    )
    counts = [sum(len(one.history) > number for one in halved) for number in range(4)]
    assert counts == [5, 5, 3, 2]
    for full, part in zip(whole, halved, strict=True):
        assert [row["dev_loss"] for row in part.history] == pytest.approx(
            [row["dev_loss"] for row in full.history[: len(part.history)]], abs=1e-9
        )
    last = {one.prune_ratio for one in halved if len(one.history) == 4}
    assert min(halved, key=lambda one: one.dev_loss).prune_ratio in last


def test_a_member_that_diverges_leaves_the_others_alone(make_tiny_model):
    backbone = make_tiny_model("llama").requires_grad_(False)
    start = start_on(backbone, "llama")
    backbone.double()
    members = members_of(backbone, start, (0.2, 0.5), (1,), ProbeSet(PROBES, PAD), MaskSettings())
    broken = AdapterWeights({n: replace(p, A=p.A * math.nan) for n, p in start.items()})
    both = [replace(members[0], weights=in_double(broken)), replace(members[1], weights=in_double(start))]
    [other] = stacked(backbone, start, (0.5,), (1,), MaskSettings(), TRAINING)
    train_stacked(backbone, both, TRAIN, ProbeSet(DEV, PAD), TRAINING, pad_id=PAD)
    assert both[0].failed.startswith("the dev loss is nan at step 0")
    assert both[1].failed is None
    assert both[1].history == other.history


def test_dropout_acts_in_training_only_and_follows_the_seed(make_tiny_model):
    backbone = make_tiny_model("llama").requires_grad_(False)
    start = start_on(backbone, "llama")
    found = []
    for dropout in (0.0, 0.5, 0.5):
        members = members_of(backbone, start, (0.3, 0.3), (1,), ProbeSet(PROBES, PAD), MaskSettings())
        train_stacked(backbone, members, TRAIN, ProbeSet(DEV, PAD), TRAINING, pad_id=PAD, dropout=dropout)
        found.append([[row["dev_loss"] for row in one.history] for one in members])
    assert found[1] == found[2] != found[0]
    assert found[0][0] == pytest.approx(found[0][1], abs=1e-4)
    assert found[1][0][0] == found[1][1][0] == found[0][0][0]  # before training
    assert found[1][0] != found[1][1]  # members draw from one stream


def test_a_stop_that_is_asked_for_and_what_cannot_be_stacked(make_tiny_model):
    backbone = make_tiny_model("llama").requires_grad_(False)
    start = start_on(backbone, "llama")
    members = members_of(backbone, start, (0.3,), (1,), ProbeSet(PROBES, PAD), MaskSettings())
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM .* run the same command again"):
        train_stacked(
            backbone, members, TRAIN, ProbeSet(DEV, PAD), TRAINING, pad_id=PAD, stop_requested=lambda: "SIGTERM"
        )
    settings = replace(TRAINING, gradient_checkpointing=True)
    with pytest.raises(GraspError, match="without gradient_checkpointing; leave it out"):
        train_stacked(backbone, members, TRAIN, ProbeSet(DEV, PAD), settings, pad_id=PAD)


def test_a_backbone_that_cuts_gradients_is_an_error(make_tiny_model, monkeypatch):
    backbone = make_tiny_model("llama").requires_grad_(False)
    members = members_of(backbone, start_on(backbone, "llama"), (0.3,), (1,), ProbeSet(PROBES, PAD), MaskSettings())
    forward = backbone.model.norm.forward
    monkeypatch.setattr(backbone.model.norm, "forward", lambda states: forward(states.detach()).requires_grad_())
    with pytest.raises(GraspError, match="no LoRA weight has a gradient, so nothing would be trained"):
        train_stacked(backbone, members, TRAIN, ProbeSet(DEV, PAD), TRAINING, pad_id=PAD)


def test_each_member_is_clipped_by_a_norm_of_its_own():
    pair = LoraPair(torch.randn(2, 4), torch.randn(3, 2), segments=(Segment("a", 1), Segment("b", 1)))
    start = AdapterWeights({"m": pair})
    stack = Stack(
        [Member(0.5, seed, start, torch.ones(14, dtype=torch.bool)) for seed in (1, 2)], torch.device("cpu"), 0.0
    )
    gradient = torch.tensor([[3.0] * 14, [0.1] * 14])
    stack.clip(gradient, 1.0)
    assert gradient[0].norm().item() == pytest.approx(1.0, rel=1e-4)
    assert gradient[1].norm().item() == pytest.approx(0.1 * math.sqrt(14))  # shorter than the limit


def test_a_module_that_reads_tokens_without_their_batch_is_refused():
    model = torch.nn.ModuleDict({"m": torch.nn.Linear(4, 3)})
    start = AdapterWeights({"m": LoraPair(torch.randn(2, 4), torch.randn(3, 2))})
    stack = Stack([Member(0.5, 1, start, torch.ones(14, dtype=torch.bool))] * 2, torch.device("cpu"), 0.0)
    with stack.on(model):
        assert model["m"](torch.ones(2, 5, 4)).shape == (2, 5, 3)
        with pytest.raises(GraspError, match="m reads tokens without their batch, as experts do"):
            model["m"](torch.ones(10, 4))
    assert model["m"](torch.ones(10, 4)).shape == (10, 3)


def test_adapters_pruned_to_nothing_train_nothing_and_are_no_error(make_tiny_model):
    backbone = make_tiny_model("llama").requires_grad_(False)
    [one] = members_of(backbone, start_on(backbone, "llama"), (1.0,), (1,), ProbeSet(PROBES, PAD), MaskSettings())
    train_stacked(backbone, [one], TRAIN, ProbeSet(DEV, PAD), TRAINING, pad_id=PAD)
    assert all(not pair.A.any() and not pair.B.any() for pair in one.weights.values())
    assert one.best_step == 0

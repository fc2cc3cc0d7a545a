"""Masks that hold through training and rounds that tell the truth, in three trainers: ours, transformers' and TRL's."""

import copy
import itertools
import json
import math
import statistics
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from random_examples import TARGETS, Example, make_examples, random_like
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grasp_lora.errors import AdapterError, DataError, GraspError, ProbeError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.masks import MaskSet, MaskSettings, prune_count, survival
from grasp_lora.method.merging import MergeSettings, merge
from grasp_lora.method.rules import RatioEstimate, Round
from grasp_lora.method.search import POLICIES, PRESETS, Controller, Decision, Gaussian, Rounds, Spread
from grasp_lora.models.adapters import attached, fresh_adapter
from grasp_lora.models.live import adapter_weights, live_pairs, segments_of
from grasp_lora.models.model_settings import LoraSettings
from grasp_lora.storage.checkpoints import read_state
from grasp_lora.training import probes as probing
from grasp_lora.training import pruned as pruned_module
from grasp_lora.training import trainer as finetune_module
from grasp_lora.training.controller import GraspController
from grasp_lora.training.loss import collate
from grasp_lora.training.probes import ProbeSet, ProbesInTurn
from grasp_lora.training.pruned import PrunedTraining
from grasp_lora.training.trainer import finetune
from grasp_lora.training.training_settings import TrainingSettings

ARCHITECTURES = list(TARGETS)
TRAINERS = ["ours", "transformers", "trl"]
PAD = 0


TRAIN = make_examples(12)
MICRO_DEV = make_examples(5, 1, "m")


def merged_adapter(model, architecture: str) -> AdapterWeights:
    """A source of rank 3 and a target of rank 2, merged; every weight is away from zero."""
    parts = []
    for seed, rank in ((1, 3), (2, 2)):
        generator = torch.Generator().manual_seed(seed)
        with fresh_adapter(model, LoraSettings(rank=rank, target_modules=TARGETS[architecture]), seed) as peft_model:
            parts.append(random_like(peft_model, generator, 0.3))
    return merge(parts, MergeSettings())


@contextmanager
def adapted(make_tiny_model, architecture: str = "llama", dropout: float = 0.0):
    """A tiny model with the merged adapter, and its weights."""
    backbone = make_tiny_model(architecture)
    weights = merged_adapter(backbone, architecture)
    with attached(backbone, weights, dropout=dropout) as model:
        yield model, weights


@pytest.fixture(name="adapter")
def fixture_adapter(make_tiny_model):
    """Of a Llama, without dropout."""
    with adapted(make_tiny_model) as both:
        yield both


@pytest.fixture
def model(adapter) -> PeftModel:
    return adapter[0]


@pytest.fixture
def weights(adapter) -> AdapterWeights:
    return adapter[1]


class Watch(TrainerCallback):
    """After every step, with the controller's own work done: the mask is on, exactly as far as it says."""

    def __init__(self, pruned: PrunedTraining) -> None:
        self.pruned = pruned
        self.steps = 0
        self.ratios: list[float] = []
        self.masks: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []

    def on_step_end(self, args, state, control, **kwargs):
        masks, ratio = self.pruned.masks, self.pruned.prune_ratio
        live = live_pairs(kwargs["model"])
        moments = kwargs["optimizer"].state
        pruned, groups = 0, 0
        for (module, factor), keep in masks.keep.items():
            weight = masks.weights[module, factor]
            assert weight is getattr(live[module], factor)
            assert (weight[~keep] == 0).all()
            assert (weight[keep] != 0).all()
            pair = masks.pairs[module]
            sizes = [segment.rank for segment in pair.segments] or [pair.rank]
            for part in keep.split(sizes, dim=0 if factor == "A" else 1):
                pruned += int((~part).sum())
                groups += 1
                assert int((~part).sum()) == prune_count(ratio, part.numel())
            if self.pruned.mode == "hold":
                for name in ("exp_avg", "exp_avg_sq"):
                    assert (moments[weight][name][~keep] == 0).all()
                    assert (moments[weight][name][keep] != 0).any()
        total = sum(weight.numel() for weight in masks.weights.values())
        assert masks.sparsity() == pruned / total
        assert abs(pruned - ratio * total) <= groups
        assert masks.ratio == ratio
        self.steps += 1
        self.ratios.append(ratio)
        self.masks.append(torch.cat([keep.flatten() for keep in masks.keep.values()]))
        self.weights.append(torch.cat([weight.detach().flatten() for weight in masks.weights.values()]))


def controller_for(
    weights: AdapterWeights,
    micro_dev=None,
    mask=None,
    folder=None,
    every=3,
    patience=None,
    kind="gaussian",
    rule="smooth_fit",
    start=0.0,
    policy=None,
    **changes,
):
    policy = policy or POLICIES[kind](**changes)
    before = policy.regime == "each_step" and start == 0
    return GraspController(
        micro_dev or ProbeSet(MICRO_DEV, PAD, token_budget=40),
        Controller(policy, Rounds(every, start, before, patience=patience), rule),
        mask=mask,
        segments=segments_of(weights),
        folder=folder,
    )


def searched(controller: GraspController) -> tuple:
    search = controller.search
    return search.mean, search.std, search.current_ratio, search.history


def settings(**changes) -> TrainingSettings:
    return TrainingSettings(**{"epochs": 1, "learning_rate": 1e-2, "patience": None, **changes})


def train_ours(model, folder, controller=None, dev=(), callbacks=(), seed=1, **changes):
    return finetune(
        model,
        TRAIN,
        dev,
        settings(**changes),
        pad_id=PAD,
        seed=seed,
        folder=folder / "run",
        controller=controller,
        callbacks=callbacks,
    )


def arguments(folder, kind=TrainingArguments, **changes):
    return kind(
        output_dir=str(folder / "run"),
        num_train_epochs=1,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no", **changes},
    )


def train_transformers(model, folder, controller, callbacks=()) -> Trainer:
    trainer = make_trainer(model, folder, controller)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def make_trainer(model, folder, callback, kind=Trainer, **changes) -> Trainer:
    trainer = kind(
        model=model,
        args=arguments(folder, remove_unused_columns=False, **changes),
        train_dataset=TRAIN,
        eval_dataset=TRAIN,
        data_collator=lambda examples: collate(examples, PAD),
    )
    if isinstance(callback, GraspController):
        callback.add_to(trainer)
    else:
        trainer.add_callback(callback)
    return trainer


def resumable(model, folder, callback, save_steps: int = 5) -> Trainer:
    """A trainer that saves checkpoints."""
    return make_trainer(model, folder, callback, save_strategy="steps", save_steps=save_steps)


ROWS = [{"prompt": f"What is {i} + {i}?", "completion": f" It is {2 * i}."} for i in range(12)]


def make_sft_trainer(model, folder, tokenizer, **changes):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    plain = {"bf16": False, "activation_checkpointing": False}
    return SFTTrainer(
        model=model,
        args=arguments(folder, SFTConfig, dataloader_pin_memory=False, **{**plain, **changes}),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )


def train_with(name, model, folder, tokenizer, controller, callbacks=()) -> Trainer | None:
    if name == "ours":
        train_ours(model, folder, controller, callbacks=callbacks)
        return None
    if name == "transformers":
        return train_transformers(model, folder, controller, callbacks)
    trainer = make_sft_trainer(model, folder, tokenizer)
    controller.add_to(trainer)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


class AfterTheController(TrainerCallback):
    """`finetune` registers the controller after the callbacks: this one brings the watch in behind it."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step and self.watch.steps < state.global_step:
            self.watch.on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        self.watch.on_step_end(args, state, control, **kwargs)


def read_rows(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# In three trainers


@pytest.mark.parametrize("kind", ["gaussian", "spread"])
@pytest.mark.parametrize("trainer_name", ["transformers", "trl"])
def test_a_resumed_training_of_any_trainer_ends_in_the_same_bits(
    make_tiny_model, tiny_tokenizer, tmp_path, trainer_name, kind
):
    def train(resume: bool) -> tuple[list[torch.Tensor], dict, list[dict]]:
        backbone = make_tiny_model("llama")
        weights = merged_adapter(backbone, "llama")
        mask = MaskSettings("input_aware")
        controller = controller_for(weights, mask=mask, folder=tmp_path / "records", kind=kind)
        saving = {"save_strategy": "steps", "save_steps": 5}
        with attached(backbone, weights, dropout=0.2) as model:
            if trainer_name == "trl":
                trainer = make_sft_trainer(model, tmp_path, tiny_tokenizer, **saving)
                controller.add_to(trainer)
            else:
                trainer = make_trainer(model, tmp_path, controller, **saving)
            trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5") if resume else None)
            factors = [factor.detach().clone() for pair in live_pairs(model).values() for factor in (pair.A, pair.B)]
        return factors, searched(controller), read_rows(tmp_path / "records" / "rounds.jsonl")

    whole, resumed = train(resume=False), train(resume=True)
    assert all(torch.equal(one, other) for one, other in zip(whole[0], resumed[0], strict=True))
    assert whole[1:] == resumed[1:]
    assert [row["step"] for row in resumed[2]] == ([0] if kind == "spread" else []) + [3, 6, 9, 12]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("trainer_name", TRAINERS)
def test_masks_hold_and_rounds_add_up(make_tiny_model, tiny_tokenizer, tmp_path, architecture, trainer_name):
    micro_dev = ProbeSet.from_rows(ROWS[:5], tiny_tokenizer) if trainer_name == "trl" else None
    with adapted(make_tiny_model, architecture, dropout=0.05) as (model, weights):
        controller = controller_for(weights, micro_dev, folder=tmp_path / "controller", every=3, candidates=3)
        watch = Watch(controller)
        callbacks = [AfterTheController(watch)] if trainer_name == "ours" else [watch]
        train_with(trainer_name, model, tmp_path, tiny_tokenizer, controller, callbacks)
        assert watch.steps == 12
        # The probes of a round count in the loss of the very weights that it found.
        assert (
            controller.micro_dev.losses(model) != read_rows(tmp_path / "controller/rounds.jsonl")[0]["baseline_losses"]
        )
    rounds = read_rows(tmp_path / "controller" / "rounds.jsonl")
    timings = read_rows(tmp_path / "controller" / "timings.jsonl")
    assert len(rounds) == len(timings) == 12 // 3 == len(controller.search.history)
    assert [row["round"] for row in rounds] == [1, 2, 3, 4]
    assert [row["step"] for row in rounds] == [3, 6, 9, 12]
    assert [row["epoch"] for row in rounds] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    ratio = 0.40
    for row, timing in zip(rounds, timings, strict=True):
        assert (timing["round"], timing["step"]) == (row["round"], row["step"])
        assert timing["probe_seconds"] > 0
        assert timing["train_seconds"] > 0
        assert len(row["candidates"]) == len(row["candidate_losses"]) == len(row["rewards"]) == 3
        assert all(0.10 <= candidate <= 0.80 for candidate in row["candidates"])
        assert {len(losses) for losses in [row["baseline_losses"], *row["candidate_losses"]]} == {5}
        for reward, losses in zip(row["rewards"], row["candidate_losses"], strict=True):
            assert reward == pytest.approx((sum(row["baseline_losses"]) - sum(losses)) / 5, abs=1e-9)
        assert row["ratio_before"] == ratio
        assert row["committed"] == (max(row["rewards"]) >= 0)
        assert row["committed"] or row["ratio"] == ratio
        assert abs(row["ratio"] - ratio) <= 0.10 + 1e-9
        ratio = row["ratio"]
        assert ratio == watch.ratios[row["step"] - 1]
        groups = 2 * 2 * len(weights)  # two factors of two segments
        total = sum(pair.A.numel() + pair.B.numel() for pair in weights.values())
        assert abs(row["measured_sparsity"] - ratio) * total <= groups
    assert rounds[-1]["ratio"] == controller.search.current_ratio == controller.prune_ratio
    assert rounds[-1]["policy_mean"] == controller.search.mean
    assert rounds[-1]["policy_std"] == controller.search.std
    assert 0.10 <= controller.search.best_ratio().ratio <= 0.80


def test_mixed_precision_and_checkpointing_as_trl_has_them_by_default(make_tiny_model, tiny_tokenizer, tmp_path):
    micro_dev = ProbeSet.from_rows(ROWS[:5], tiny_tokenizer)
    with adapted(make_tiny_model, dropout=0.05) as (model, weights):
        trainer = make_sft_trainer(model, tmp_path, tiny_tokenizer, bf16=True, activation_checkpointing=True)
        controller = controller_for(weights, micro_dev, MaskSettings("input_aware"), folder=tmp_path).add_to(trainer)
        watch = Watch(controller)
        trainer.add_callback(watch)
        trainer.train()
        assert watch.steps == 12
        assert {weight.dtype for weight in controller.masks.weights.values()} == {torch.float32}
        measured = micro_dev.losses(model)
    assert len(read_rows(tmp_path / "rounds.jsonl")) == 4
    assert all(math.isfinite(loss) for loss in measured)


@pytest.mark.parametrize("merges", [(), ("?", "Ġ")])
def test_rows_are_tokenised_as_trl_tokenises_them(make_tiny_model, tiny_tokenizer, tmp_path, merges):
    from tokenizers import models

    from grasp_lora.data.encode import encode_rows

    tokenizer = copy.deepcopy(tiny_tokenizer)
    if merges:  # the end of a prompt and the beginning of its answer become one token
        vocabulary = tokenizer.get_vocab()
        vocabulary["".join(merges)] = merged = len(vocabulary)
        tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[merges], unk_token="<unk>")
    backbone = make_tiny_model("llama")
    with attached(backbone, merged_adapter(backbone, "llama")) as model:
        trainer = make_sft_trainer(model, tmp_path, tokenizer)
        trained_on = list(trainer.train_dataset)
    encoded = encode_rows(ROWS, tokenizer)
    assert not merges or all(one.completion_ids[0] == merged for one in encoded)
    for ours, theirs in zip(encoded, trained_on, strict=True):
        assert [*ours.prompt_ids, *ours.completion_ids] == theirs["input_ids"]
        completion = [
            token for token, label in zip(theirs["input_ids"], theirs["labels"], strict=True) if label != -100
        ]
        assert list(ours.completion_ids) == completion


@pytest.mark.parametrize("trainer_name", ["transformers", "trl"])
def test_trackers_receive_the_rounds(model, weights, tiny_tokenizer, tmp_path, trainer_name):
    class Tracker(TrainerCallback):
        def __init__(self) -> None:
            self.rows: list[dict] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.rows.append({"step": state.global_step, **logs})

    tracker, same = Tracker(), ("policy_mean", "policy_std", "measured_sparsity")
    controller = controller_for(weights, folder=tmp_path / "controller")
    trainer = train_with(trainer_name, model, tmp_path, tiny_tokenizer, controller, [tracker])
    rounds = read_rows(tmp_path / "controller" / "rounds.jsonl")
    for rows in (tracker.rows, trainer.state.log_history):
        rows = [row for row in rows if "grasp/prune_ratio" in row]
        assert [row["step"] for row in rows] == [3, 6, 9, 12]
        for row, measured in zip(rows, rounds, strict=True):
            assert {key: row[f"grasp/{key}"] for key in same} == {key: measured[key] for key in same}
            assert row["grasp/prune_ratio"] == measured["ratio"]
            assert row["grasp/best_reward"] == max(measured["rewards"])
            assert row["grasp/micro_dev_loss"] == pytest.approx(sum(measured["baseline_losses"]) / 5)
            assert all(key.startswith("grasp/") or key in ("step", "epoch") for key in row)


@pytest.mark.parametrize("trainer_name", ["transformers", "trl"])
def test_a_round_takes_no_row_from_the_trainers_own_log(
    make_tiny_model, tiny_tokenizer, tmp_path, trainer_name, monkeypatch
):
    # A log call within a step ends the trainer's wish to log its loss; TRL's also empties its running metrics.
    found = []
    for rounds in (True, False):
        if not rounds:
            monkeypatch.setattr(GraspController, "_round_follows", lambda *_: False)
        with adapted(make_tiny_model) as (model, weights):
            controller = controller_for(weights, every=3, policy=NeverCommits())
            trainer = train_with(trainer_name, model, tmp_path, tiny_tokenizer, controller)
        rows = [row for row in trainer.state.log_history if "loss" in row]
        found.append([{key: value for key, value in row.items() if "runtime" not in key} for row in rows])
    assert [row["step"] for row in found[0]] == list(range(1, 13))
    assert found[0] == found[1]


# What a round measures


@pytest.mark.parametrize("score", ["magnitude", "input_aware", "gradient_of_delta"])
def test_candidate_losses_are_those_of_the_pruned_model(model, weights, tmp_path, monkeypatch, score):
    """A round's numbers, measured again by hand from the weights that it found."""
    rank, rankings = MaskSet.rank, []
    monkeypatch.setattr(MaskSet, "rank", lambda self: rankings.append(rank(self)) or rankings[-1])

    class Keep(TrainerCallback):  # stands before the controller
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                masks = controller.masks
                self.pruned = {key: weight.detach().clone() for key, weight in masks.weights.items()}
                self.dense = {
                    key: torch.where(masks.keep[key], weight, masks.stash[key]) for key, weight in self.pruned.items()
                }

    keep = Keep()
    controller = controller_for(weights, folder=tmp_path, mask=MaskSettings(score), every=3)
    train_ours(model, tmp_path, controller, callbacks=[keep])
    row = read_rows(tmp_path / "rounds.jsonl")[0]

    def measure(values) -> list[float]:
        with torch.no_grad():
            for key, value in values.items():
                controller.masks.weights[key].copy_(value)
        return ProbeSet(MICRO_DEV, PAD).losses(model)

    assert measure(keep.pruned) == pytest.approx(row["baseline_losses"], abs=1e-5)
    for candidate, losses in zip(row["candidates"], row["candidate_losses"], strict=True):
        masks = controller.masks.keep_masks(candidate, rankings[1])  # the first is that of the beginning
        pruned = {key: torch.where(masks[key], value, 0.0) for key, value in keep.dense.items()}
        assert measure(pruned) == pytest.approx(losses, abs=1e-5)


@dataclass(frozen=True)
class InForce(Spread):
    """Its first candidate is the ratio in force."""

    def draw(self, search, generator):
        return [search.current_ratio, 0.3, 0.6]


def test_a_candidate_at_the_ratio_in_force_has_the_baseline_of_its_own_examples(model, weights, tmp_path):
    probes = ProbesInTurn(make_examples(7, 1, "m"), PAD, count=3, seed=5)
    controller = controller_for(weights, probes, folder=tmp_path, patience=99, policy=InForce())
    train_ours(model, tmp_path, controller)
    for row in read_rows(tmp_path / "rounds.jsonl"):
        assert row["candidate_losses"][0] == [row["baseline_losses"][place] for place in row["places"]]
        assert row["rewards"][0] == 0.0


@dataclass(frozen=True)
class NeverCommits(Gaussian):
    """Draws and learns as always, but takes every reward for a negative one."""

    def decide(self, search, measured):
        return Decision(measured.rewards, False, search.current_ratio)


@pytest.mark.parametrize(
    ("architecture", "score"),
    [*((name, "magnitude") for name in ARCHITECTURES), ("llama", "input_aware"), ("gpt2", "gradient_of_delta")],
)
def test_probing_without_a_commit_does_not_change_the_training(
    make_tiny_model, tmp_path, architecture, score, monkeypatch
):
    found = []
    for rounds in (6, 0):
        if not rounds:
            monkeypatch.setattr(GraspController, "_round_follows", lambda *_: False)
        with adapted(make_tiny_model, architecture, dropout=0.3) as (model, weights):
            controller = controller_for(weights, mask=MaskSettings(score), every=2, policy=NeverCommits())
            train_ours(model, tmp_path, controller)
            assert len(controller.search.history) == rounds
            found.append(adapter_weights(model))
    for name, pair in found[0].items():
        assert torch.equal(pair.A, found[1][name].A)
        assert torch.equal(pair.B, found[1][name].B)


@dataclass(frozen=True)
class Scripted(Gaussian):
    """Commits these ratios, one a round."""

    ratio_min: float = 0.0
    ratios: tuple[float, ...] = (0.5, 0.2, 0.7, 0.0)

    def decide(self, search, measured):
        return Decision(measured.rewards, True, self.ratios[len(search.history) - 1], True)


def test_ratios_that_rise_and_fall_are_followed_exactly(model, weights, tmp_path):
    controller = controller_for(weights, policy=Scripted())
    watch = Watch(controller)
    train_transformers(model, tmp_path, controller, [watch])
    assert watch.ratios == [0.4, 0.4, 0.5, 0.5, 0.5, 0.2, 0.2, 0.2, 0.7, 0.7, 0.7, 0.0]
    assert watch.masks[-1].all()
    shares = [1 - float(mask.float().mean()) for mask in watch.masks]
    assert shares == pytest.approx(watch.ratios, abs=0.01)
    assert (watch.weights[5] != 0).sum() > (watch.weights[4] != 0).sum()  # revived ones are back at their values


# Errors


def test_a_probe_that_fails_names_the_ratio_and_the_example(make_tiny_model, tmp_path, monkeypatch):
    measure = probing.example_losses
    calls = []

    def fail(model, batch, **options):
        losses = measure(model, batch, **options)
        calls.append(len(losses))
        return losses if len(calls) < 3 else losses.index_fill(0, torch.tensor([1]), math.inf)

    backbone = make_tiny_model("llama")
    weights = merged_adapter(backbone, "llama")
    micro_dev = ProbeSet([Example(f"m{i}", (5, 6, 7), (8, 2)) for i in range(3)], PAD)
    with attached(backbone, weights) as model:
        controller = controller_for(weights, micro_dev, folder=tmp_path)
        monkeypatch.setattr(probing, "example_losses", fail)
        with pytest.raises(ProbeError) as error:
            train_ours(model, tmp_path, controller)
        assert str(error.value).startswith("the loss of example m1 is inf")
        assert "\n" not in str(error.value)
        assert len(calls) == 3  # baseline, first candidate, second candidate
        # The committed mask is on again, not the candidate's; nothing was learned.
        assert controller.masks.sparsity() == pytest.approx(0.4, abs=0.01)
        assert not controller.search.history
        assert not any(module.training for module in backbone.modules())
    assert read_rows(tmp_path / "rounds.jsonl") == []


def test_modes_and_ratios_that_do_not_exist_are_an_error():
    with pytest.raises(ValueError, match=r"prune_ratio is 0\.5 and mode 'keep'; give a fraction"):
        PrunedTraining(0.5, ProbeSet(MICRO_DEV, PAD), mode="keep")
    for ratio in (40, math.nan, RatioEstimate(0.4, 0.3, 0.5, "best_reward", 3)):
        with pytest.raises(ValueError, match=r"prune_ratio is .*; give a fraction in .*, such as learned\.ratio"):
            PrunedTraining(ratio, ProbeSet(MICRO_DEV, PAD))
    assert PrunedTraining(torch.tensor(0.5), ProbeSet(MICRO_DEV, PAD)).prune_ratio == 0.5


# The final run


@pytest.mark.parametrize("mode", ["hold", "reselect"])
@pytest.mark.parametrize(
    ("architecture", "score"),
    [*((name, "gradient_of_delta") for name in ARCHITECTURES), ("llama", "magnitude"), ("gemma3", "input_aware")],
)
def test_a_fixed_ratio_holds_after_every_step(make_tiny_model, tmp_path, architecture, mode, score):
    with adapted(make_tiny_model, architecture, dropout=0.05) as (model, weights):
        pruned = PrunedTraining(0.37, ProbeSet(MICRO_DEV, PAD), MaskSettings(score), mode, segments_of(weights))
        watch = Watch(pruned)
        train_ours(model, tmp_path, callbacks=[pruned, watch], learning_rate=5e-2)
    assert watch.steps == 12
    changed = any(not torch.equal(mask, watch.masks[0]) for mask in watch.masks)
    assert changed == (mode == "reselect")


def test_reselect_takes_the_least_important_of_the_weights_as_they_are(model, weights, tmp_path):
    class Dense(TrainerCallback):
        """Stands before the pruning: sees what the optimizer made of the weights."""

        def on_optimizer_step(self, args, state, control, **kwargs):
            self.weights = {key: weight.detach().clone() for key, weight in pruned.masks.weights.items()}

    class Check(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            for (module, factor), keep in pruned.masks.keep.items():
                sizes = [segment.rank for segment in weights[module].segments]
                dimension = 0 if factor == "A" else 1
                now, before = pruned.masks.weights[module, factor], dense.weights[module, factor]
                assert torch.equal(now, before * keep)
                for part, mask in zip(before.split(sizes, dimension), keep.split(sizes, dimension), strict=True):
                    assert part[~mask].abs().max() <= part[mask].abs().min()
            self.steps += 1

    pruned = PrunedTraining(0.5, ProbeSet(MICRO_DEV, PAD), None, "reselect", segments_of(weights))
    dense, check = Dense(), Check()
    train_ours(model, tmp_path, callbacks=[dense, pruned, check])
    assert check.steps == 12


def test_a_held_mask_survives_a_step_that_moves_every_weight(model, weights, tmp_path):
    # Gradients of masked weights are stopped, so Adam leaves them alone; an optimizer with noise of its own does not.
    class Disturb(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            for weight in pruned.masks.weights.values():
                weight.data += 1.0

    pruned = PrunedTraining(0.5, ProbeSet(MICRO_DEV, PAD), segments=segments_of(weights))
    watch = Watch(pruned)
    train_ours(model, tmp_path, callbacks=[Disturb(), pruned, watch])
    assert watch.steps == 12


def script_dev_losses(monkeypatch, losses) -> None:
    """Let the dev set of `finetune` measure these; probes and calibration measure as always."""
    remaining = iter(losses)

    class Scripted(ProbeSet):
        def losses(self, model, collector=None):
            return [next(remaining)] * len(self)

    monkeypatch.setattr(finetune_module, "ProbeSet", Scripted)


BEST = [(0, [1.0, 2.0, 3.0, 4.0, 5.0]), (6, [3.0, 2.0, 1.0, 4.0, 5.0]), (12, [5.0, 4.0, 3.0, 2.0, 1.0])]


@pytest.mark.parametrize("mode", ["hold", "reselect"])
@pytest.mark.parametrize(("best_step", "losses"), BEST)
def test_the_best_weights_are_pruned_exactly(model, weights, tmp_path, monkeypatch, mode, best_step, losses):
    script_dev_losses(monkeypatch, losses)
    pruned = PrunedTraining(0.5, ProbeSet(MICRO_DEV, PAD), None, mode, segments_of(weights))
    result = train_ours(model, tmp_path, dev=MICRO_DEV[:2], callbacks=[pruned], evaluate_every=0.25)
    assert result.best_step == best_step
    for row in survival(live_pairs(model, segments_of(weights))):
        assert row["weights"] - row["kept"] == prune_count(0.5, row["weights"])


@pytest.mark.parametrize(("best_step", "losses"), BEST)
def test_a_controller_prunes_before_the_dev_loss_is_measured(model, weights, tmp_path, monkeypatch, best_step, losses):
    script_dev_losses(monkeypatch, losses)
    controller = controller_for(weights, folder=tmp_path, every=3, policy=Scripted())
    result = train_ours(model, tmp_path, controller, dev=MICRO_DEV[:2], evaluate_every=0.25)  # every third step
    assert result.best_step == best_step
    ratio = {0: 0.4, 6: 0.2, 12: 0.0}[best_step]
    for row in survival(live_pairs(model, segments_of(weights))):
        assert row["weights"] - row["kept"] == prune_count(ratio, row["weights"])


def test_a_ratio_of_zero_trains_as_if_there_were_no_masks(make_tiny_model, tmp_path):
    found = []
    for with_masks in (True, False):
        with adapted(make_tiny_model, dropout=0.3) as (model, _):
            callbacks = [PrunedTraining(0.0, ProbeSet(MICRO_DEV, PAD))] if with_masks else []
            train_ours(model, tmp_path, callbacks=callbacks, weight_decay=0.1)
            found.append(adapter_weights(model))
    for name, pair in found[0].items():
        assert torch.equal(pair.A, found[1][name].A)
        assert torch.equal(pair.B, found[1][name].B)


@pytest.mark.parametrize(("every", "accumulation", "steps"), [(2, 3, [2, 4, 6, 8]), ("epoch", 5, [3, 6])])
def test_rounds_and_epochs_count_optimizer_steps(model, weights, tmp_path, every, accumulation, steps):
    controller = controller_for(weights, folder=tmp_path, every=every)
    result = train_ours(model, tmp_path, controller, accumulation=accumulation, epochs=2)
    assert result.steps == steps[-1]
    assert [row["step"] for row in read_rows(tmp_path / "rounds.jsonl")] == steps


# All ratios together


class WatchSteps(TrainerCallback):
    """The ratio and the weights that each step trains, seen between its begin and its optimizer step."""

    def __init__(self, controller: GraspController) -> None:
        self.controller = controller
        self.ratios: list[float] = []
        self.pruned: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        masks = self.controller.masks
        self.ratios.append(masks.ratio)
        self.pruned.append(torch.cat([(weight == 0).flatten() for weight in masks.weights.values()]))
        assert all(torch.equal(weight == 0, ~masks.keep[key]) for key, weight in masks.weights.items())


@pytest.mark.parametrize("trainer_name", TRAINERS)
def test_each_step_of_spread_trains_at_its_own_ratio(make_tiny_model, tiny_tokenizer, tmp_path, trainer_name):
    micro_dev = ProbeSet.from_rows(ROWS[:5], tiny_tokenizer) if trainer_name == "trl" else None
    with adapted(make_tiny_model, dropout=0.05) as (model, weights):
        controller = controller_for(weights, micro_dev, folder=tmp_path, every=4, kind="spread")
        watch = WatchSteps(controller)
        train_with(trainer_name, model, tmp_path, tiny_tokenizer, controller, [watch])
        left = torch.cat([(weight == 0).flatten() for weight in controller.masks.weights.values()])
    assert watch.ratios == [controller.search.training_ratio(step) for step in range(12)]
    assert max(watch.ratios) - min(watch.ratios) > 0.5
    in_order = [pruned for _, pruned in sorted(zip(watch.ratios, watch.pruned, strict=True), key=lambda pair: pair[0])]
    for lower, higher in itertools.pairwise(in_order):
        assert (higher | ~lower).all()  # one ranking, so the masks nest although the weights move
    rows = read_rows(tmp_path / "rounds.jsonl")
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    assert [row["ratio_before"] for row in rows[1:]] == [row["ratio"] for row in rows[:-1]]
    assert all(row["measured_sparsity"] == pytest.approx(row["ratio"], abs=0.02) for row in rows)
    # What is left is pruned at the learned ratio, not at that of the last step.
    assert controller.masks.ratio == controller.search.current_ratio == controller.search.best_ratio().ratio
    assert left.double().mean().item() == pytest.approx(controller.search.current_ratio, abs=0.02)


def test_the_first_round_of_spread_sees_the_untrained_adapter(make_tiny_model, tmp_path):
    backbone = make_tiny_model("llama")
    weights = merged_adapter(backbone, "llama")
    probes = ProbeSet(MICRO_DEV, PAD)
    with attached(backbone, weights) as model:
        masks = MaskSet(live_pairs(model, segments_of(weights)), MaskSettings())
        with masks.probe(0.4):
            untrained = probes.losses(model)
    with attached(backbone, weights) as model:
        controller = controller_for(weights, probes, folder=tmp_path, every=5, kind="spread", ratio_init=0.4)
        train_ours(model, tmp_path, controller)
    assert read_rows(tmp_path / "rounds.jsonl")[0]["baseline_losses"] == pytest.approx(untrained, abs=1e-6)


def test_a_weight_that_is_masked_for_a_step_is_not_trained_in_it(model, weights, tmp_path):
    controller = controller_for(weights, every=50, kind="spread")
    dense: list[dict] = []

    class Dense(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            masks = controller.masks
            stashed = {k: torch.where(masks.keep[k], w, masks.stash[k]) for k, w in masks.weights.items()}
            dense.append({"values": stashed, "keep": dict(masks.keep)})

    train_ours(model, tmp_path, controller, callbacks=[Dense()])
    moved = 0
    for before, after in itertools.pairwise(dense):
        for key, keep in before["keep"].items():
            same = before["values"][key] == after["values"][key]
            assert same[~keep].all()
            moved += int((~same[keep]).sum())
    assert moved


# Scripted baselines


class ScriptedBaselines(ProbeSet):
    """Measures these baselines; candidates are measured as always."""

    def __init__(self, baselines, candidates: int) -> None:
        super().__init__(MICRO_DEV, PAD)
        self._baselines = iter(baselines)
        self._calls = itertools.cycle([True] + candidates * [False])

    def losses(self, model, collector=None):
        measured = super().losses(model, collector)
        return [next(self._baselines)] * len(measured) if next(self._calls) else measured


@pytest.mark.parametrize(
    ("baselines", "patience", "rounds"),
    [
        ([3.0, 1.0, 2.0, 1.5, 1.2], 2, 4),
        ([3.0, 1.0, 2.0, 0.5, 1.2], 2, 5),  # a new best in time; then the steps are over
        ([1.0, 2.0, 3.0, 4.0, 5.0], 1, 2),
        ([1.0, 2.0, 3.0, 4.0, 5.0], None, 5),
    ],
)
def test_training_stops_when_no_ratio_gets_lower(model, weights, tmp_path, baselines, patience, rounds):
    controller = controller_for(
        weights, ScriptedBaselines(baselines, candidates=3), folder=tmp_path, kind="spread", patience=patience
    )
    result = train_ours(model, tmp_path, controller)
    assert len(read_rows(tmp_path / "rounds.jsonl")) == rounds
    assert result.steps == 3 * (rounds - 1)  # the first round comes before training


def test_a_training_that_patience_had_stopped_stops_again_without_a_round(make_tiny_model, tmp_path):
    """In a trainer of one's own, which saves at the very step that patience stops."""

    def train(resume: bool) -> tuple[int, list[dict]]:
        with adapted(make_tiny_model) as (model, weights):
            probes = ScriptedBaselines([1.0, *itertools.repeat(9.0, 9)], candidates=3)
            controller = controller_for(weights, probes, folder=tmp_path / "records", kind="spread", patience=1)
            trainer = resumable(model, tmp_path, controller, save_steps=3)
            trainer.train(resume_from_checkpoint=resume)
        return trainer.state.global_step, read_rows(tmp_path / "records" / "rounds.jsonl")

    stopped, rounds = train(resume=False)
    assert (stopped, [row["step"] for row in rounds]) == (3, [0, 3])
    assert train(resume=True) == (4, rounds)


@pytest.mark.parametrize(
    ("name", "plugin", "message"),
    [
        ("fsdp_plugin", SimpleNamespace(fsdp_version=2), "FSDP by accelerate.*backbone.shard"),
        ("deepspeed_plugin", SimpleNamespace(), "DeepSpeed.*backbone.shard"),
    ],
)
def test_sharding_that_hides_the_weights_is_refused(make_tiny_model, tmp_path, monkeypatch, name, plugin, message):
    weights = merged_adapter(backbone := make_tiny_model("llama"), "llama")
    monkeypatch.setattr(pruned_module, "AcceleratorState", lambda: SimpleNamespace(**{name: plugin}))
    with attached(backbone, weights) as model, pytest.raises(GraspError, match=message):
        controller_for(weights).on_train_begin(arguments(tmp_path), TrainerState(), TrainerControl(), model=model)


@pytest.fixture
def probed(monkeypatch):
    """The ids of the examples of each measurement, in order."""
    seen = []
    losses = ProbeSet.losses
    monkeypatch.setattr(ProbeSet, "losses", lambda self, *rest: seen.append(self.ids) or losses(self, *rest))
    return seen


@pytest.mark.parametrize("compared_by", ["nothing", "patience", "surrogate"])
@pytest.mark.parametrize("kind", ["spread", "gaussian"])
def test_examples_take_turns_and_a_baseline_is_of_all_where_rounds_are_compared(
    model, weights, tmp_path, probed, kind, compared_by
):
    pool = make_examples(7, 1, "m")
    how = {"nothing": {}, "patience": {"patience": 99}, "surrogate": {"rule": "surrogate"}}
    probes = ProbesInTurn(pool, PAD, count=3, seed=5)
    controller = controller_for(weights, probes, folder=tmp_path, kind=kind, **how[compared_by])
    train_ours(model, tmp_path, controller)
    rows = read_rows(tmp_path / "rounds.jsonl")
    whole, turns = probes.whole.ids, [probes.at(number).ids for number in range(len(rows))]
    assert sorted(whole) == sorted(one.id for one in pool)
    # The baseline and three candidates of a round on the same ones, or the baseline on all.
    expected = [[turn if compared_by == "nothing" else whole, *[turn] * 3] for turn in turns]
    assert probed == list(itertools.chain(*expected))
    assert turns != [ProbesInTurn(pool, PAD, count=3, seed=6).at(number).ids for number in range(len(rows))]
    for turn, row, measured in zip(turns, rows, controller.search.history, strict=True):
        baseline = row["baseline_losses"]
        if compared_by != "nothing":
            assert [whole[place] for place in row["places"]] == turn
            assert len(baseline) == 7
            baseline = [baseline[place] for place in row["places"]]
        assert {len(one) for one in [baseline, *row["candidate_losses"]]} == {3}
        rewards = [statistics.fmean(baseline) - statistics.fmean(one) for one in row["candidate_losses"]]
        assert row["rewards"] == pytest.approx(rewards)
        assert measured == Round.from_json(row)


@pytest.mark.parametrize(
    ("kind", "start", "steps"),
    [("spread", 1.0, [12]), ("spread", 0.6, [10, 12]), ("gaussian", 0.6, [10, 12]), ("gaussian", 0.0, [5, 10])],
)
def test_rounds_may_begin_late(model, weights, tmp_path, kind, start, steps):
    controller = controller_for(weights, folder=tmp_path, kind=kind, start=start, every=5)
    train_ours(model, tmp_path, controller)
    kept = adapter_weights(model, segments_of(weights))
    rows = read_rows(tmp_path / "rounds.jsonl")
    assert [row["step"] for row in rows] == steps
    assert rows[0]["ratio_before"] == 0.4
    for row in survival(kept):
        assert row["weights"] - row["kept"] == prune_count(controller.search.current_ratio, row["weights"])


# Trainings that go on, are saved, or begin again


class AtThePolicysRatio(TrainerCallback):
    """What is saved and evaluated is pruned at the policy's ratio."""

    def __init__(self, controller: GraspController) -> None:
        self.controller = controller
        self.ratios: dict[str, list[tuple[float, float]]] = {"save": [], "evaluate": []}

    def _note(self, event: str, model) -> None:
        live = torch.cat([factor.flatten() for pair in live_pairs(model).values() for factor in (pair.A, pair.B)])
        self.ratios[event].append((self.controller.search.current_ratio, (live == 0).float().mean().item()))

    def on_save(self, args, state, control, **kwargs):
        self._note("save", kwargs["model"])

    def on_evaluate(self, args, state, control, **kwargs):
        self._note("evaluate", kwargs["model"])


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_run_of_spread_is_saved_evaluated_and_reloaded_at_the_policys_ratio(make_tiny_model, tmp_path, strategy):
    backbone = make_tiny_model("llama")
    weights = merged_adapter(backbone, "llama")
    controller = controller_for(weights, kind="spread", every=5)
    watch = AtThePolicysRatio(controller)
    saving = {"save_strategy": strategy, "save_steps": 4, "eval_strategy": strategy, "eval_steps": 4}
    with attached(backbone, weights) as model:
        trainer = make_trainer(model, tmp_path, controller, load_best_model_at_end=True, **saving)
        trainer.add_callback(watch)
        trainer.train()
        best = PeftModel.from_pretrained(make_tiny_model("llama"), trainer.state.best_model_checkpoint)
        for name, pair in live_pairs(model).items():
            assert torch.equal(pair.A, live_pairs(best)[name].A)
            assert torch.equal(pair.B, live_pairs(best)[name].B)

    assert len(watch.ratios["save"]) == len(watch.ratios["evaluate"]) == (3 if strategy == "steps" else 1)
    for wanted, found in watch.ratios["save"] + watch.ratios["evaluate"]:
        assert found == pytest.approx(wanted, abs=0.03)  # each segment of a factor rounds down


@pytest.mark.parametrize("kind", ["gaussian", "spread"])
def test_a_second_training_begins_dense_with_a_policy_of_its_own(model, weights, tmp_path, kind):
    controller = controller_for(weights, kind=kind, ratio_init=0.5)
    train_transformers(model, tmp_path, controller)
    first = controller.search
    dense = [torch.where(controller.masks.keep[key], *pair) for key, pair in _live_and_stash(controller.masks)]
    train_transformers(model, tmp_path, controller)

    assert controller.search is not first
    assert len(controller.search.history) == len(first.history) > 0
    assert all((weight != 0).all() for weight in dense)
    after = [torch.where(controller.masks.keep[key], *pair) for key, pair in _live_and_stash(controller.masks)]
    assert all((weight != 0).all() for weight in after)


@pytest.mark.parametrize("kind", ["gaussian", "spread"])
def test_a_controller_that_has_trained_already_takes_up_a_checkpoint_as_it_is(model, weights, tmp_path, kind):
    class AtTheBeginning(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            masks = controller.masks
            self.pruned = all((masks.weights[key][~keep] == 0).all() for key, keep in masks.keep.items())

    controller, first = controller_for(weights, kind=kind, ratio_init=0.5), AtTheBeginning()
    trainer = resumable(model, tmp_path, controller)
    trainer.train()
    trainer.add_callback(first)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))

    assert first.pruned
    assert controller.search.history


@pytest.mark.parametrize(
    ("controls", "changes", "message"),
    [
        (False, {"prune_ratio": 0.7}, "prune_ratio 0.4 and resumes with 0.7"),
        (False, {"mode": "reselect"}, "mode 'hold' and resumes with 'reselect'"),
        (True, {"mask": MaskSettings("input_aware")}, "mask.score 'magnitude' and resumes with 'input_aware'"),
        (True, {"segments": None}, "segments"),
    ],
)
def test_a_training_does_not_resume_with_other_masks(make_tiny_model, tmp_path, controls, changes, message):
    def train(**options) -> None:
        backbone = make_tiny_model("llama")
        weights = merged_adapter(backbone, "llama")
        options = {"segments": segments_of(weights)} | options
        probes = ProbeSet(MICRO_DEV, PAD)
        given = Controller(Gaussian(), Rounds(3), "smooth_fit")
        callback = GraspController(probes, given, **options) if controls else None
        callback = callback or PrunedTraining(**{"prune_ratio": 0.4, "calibration": probes} | options)
        checkpoint = tmp_path / "run" / "checkpoint-5"
        with attached(backbone, weights) as model:
            trainer = resumable(model, tmp_path, callback)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint.exists() else None)

    train()
    train()
    with pytest.raises(GraspError, match=message):
        train(**changes)


def test_a_checkpoint_of_another_folder_is_refused(make_tiny_model, tmp_path):
    """The masks would be those of the own folder's checkpoint, of the same step."""
    for folder, seed in (("one", 0), ("other", 1)):
        torch.manual_seed(seed)
        backbone = make_tiny_model("llama")
        weights = AdapterWeights(
            {
                name: replace(pair, A=torch.randn_like(pair.A), B=torch.randn_like(pair.B))
                for name, pair in merged_adapter(backbone, "llama").items()
            }
        )
        with attached(backbone, weights) as model:
            resumable(model, tmp_path / folder, PrunedTraining(0.5, ProbeSet(MICRO_DEV, PAD))).train()
    backbone = make_tiny_model("llama")
    with attached(backbone, weights) as model:
        trainer = resumable(model, tmp_path / "one", PrunedTraining(0.5, ProbeSet(MICRO_DEV, PAD)))
        with pytest.raises(GraspError, match=r"one/run/checkpoint-5, so its masks do not fit them"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "other" / "run" / "checkpoint-5"))


@pytest.mark.parametrize("controls", [True, False])
def test_an_untrained_adapter_is_not_pruned_by_position(make_tiny_model, tmp_path, controls):
    probes = ProbeSet(MICRO_DEV, PAD)
    with fresh_adapter(make_tiny_model("llama"), LoraSettings(), 0) as model:
        callback = GraspController(probes, Controller()) if controls else PrunedTraining(0.5, probes)
        with pytest.raises(GraspError, match=r"all zero in each of its 4 modules.*trained or merged adapter"):
            resumable(model, tmp_path, callback).train()
        if controls:  # it may prune later, whatever it begins with
            callback = GraspController(probes, Controller(Spread(ratio_min=0.0, ratio_init=0.0)))
            with pytest.raises(GraspError, match=r"all zero in each of its 4 modules.*trained or merged adapter"):
                resumable(model, tmp_path / "from 0", callback).train()
        # What is chosen anew after every step has an order from the first step on.
        again = PrunedTraining(0.5, probes, mode="reselect")
        resumable(model, tmp_path / "again", again).train()
        assert again.masks.sparsity() == pytest.approx(0.5, abs=0.05)


def _live_and_stash(masks):
    return [(key, (masks.weights[key].detach(), masks.stash[key])) for key in masks.weights]


def loading_the_best(model, folder, controller, best: int) -> Trainer:
    """A trainer whose checkpoint of step `best` is the best of those of steps 4, 8 and 12."""

    class Scripted(Trainer):
        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": abs(self.state.global_step - best)}
            self.log(metrics)
            return metrics

    saving = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    return make_trainer(model, folder, controller, Scripted, load_best_model_at_end=True, **saving)


class AtTheBeginning(TrainerCallback):
    """Keeps the weights with which a training begins, those included that are pruned at once."""

    def __init__(self, controller: GraspController) -> None:
        self.controller = controller

    def on_train_begin(self, args, state, control, **kwargs):
        self.dense = dense(self.controller.masks)


def dense(masks: MaskSet) -> dict:
    return {key: torch.where(masks.keep[key], *pair).clone() for key, pair in _live_and_stash(masks)}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", ["gaussian", "spread"])
def test_the_best_checkpoint_brings_its_own_masks_rounds_and_stash(model, weights, tmp_path, caplog, kind):
    controller = controller_for(weights, kind=kind, folder=tmp_path, ratio_init=0.5)
    beginning = AtTheBeginning(controller)
    trainer = loading_the_best(model, tmp_path, controller, best=4)
    trainer.train()
    values, tensors = read_state(tmp_path / "run" / "checkpoint-4", controller.state_name)
    masks, search = controller.masks, controller.search
    rounds = values["rows"]["rounds.jsonl"]
    assert [row["step"] for row in rounds] == ([0, 3] if kind == "spread" else [3])
    assert len(search.history) == len(rounds)
    assert read_rows(tmp_path / "rounds.jsonl") == controller.rows()[0] == rounds
    assert controller.learned.ratio > 0
    assert controller.prune_ratio == search.current_ratio == masks.ratio == values["ratio"] == rounds[-1]["ratio"]
    for key, weight in masks.weights.items():
        assert weight is getattr(live_pairs(model)[key[0]], key[1])
        assert torch.equal(masks.keep[key], weight != 0)  # the best checkpoint's, not the last round's
        assert torch.equal(masks.stash[key], tensors[f"stash.{key[1]}.{key[0]}"])
    assert "checkpoint-4" in caplog.text
    best = dense(masks)
    trainer.add_callback(beginning)
    trainer.args.load_best_model_at_end = False
    trainer.train()
    assert same(beginning.dense, best)


@pytest.mark.parametrize("change", ["doubled", "trained anew", "reloaded after a failure"])
def test_no_stash_goes_back_on_weights_that_it_was_not_taken_from(model, weights, tmp_path, caplog, change):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if change == "reloaded after a failure":
                raise KeyboardInterrupt

    controller = controller_for(weights, ratio_init=0.5)
    beginning = AtTheBeginning(controller)
    with pytest.raises(KeyboardInterrupt) if "failure" in change else nullcontext():
        train_transformers(model, tmp_path, controller, [Fails()])
    with torch.no_grad():
        for (module, factor), weight in controller.masks.weights.items():
            weight.copy_(2 * weight if change == "doubled" else getattr(weights[module], factor))
    loaded = {key: weight.detach().clone() for key, weight in controller.masks.weights.items()}
    train_transformers(model, tmp_path, controller, [beginning])
    assert same(beginning.dense, loaded)
    assert "changed since" in caplog.text


def test_a_best_checkpoint_that_could_not_be_put_back_is_refused_at_once(make_tiny_model, tmp_path):
    trainer = loading_the_best(own_adapters(make_tiny_model, "mine"), tmp_path, controller_for({}), best=4)
    with pytest.raises(GraspError, match="puts back an adapter named 'default' only, and 'mine' is active"):
        trainer.callback_handler.on_train_begin(trainer.args, TrainerState(), TrainerControl())


def test_a_best_checkpoint_that_was_not_put_back_is_an_error(make_tiny_model, tmp_path, monkeypatch):
    backbone = make_tiny_model("llama")
    weights = merged_adapter(backbone, "llama")
    controller = controller_for(weights, policy=Scripted(), start=0)
    monkeypatch.setattr(Trainer, "_load_best_model", lambda self: None)
    with (
        attached(backbone, weights) as model,
        pytest.raises(GraspError, match=r"^the weights are not those of .*checkpoint-4, so its masks do not fit them"),
    ):
        loading_the_best(model, tmp_path, controller, best=4).train()


# Adapters of one's own


def own_adapters(make_tiny_model, *names: str, architecture: str = "llama", **config) -> PeftModel:
    """A tiny model with LoRA adapters of these names, none of whose factors is zero; the last one is active."""
    torch.manual_seed(0)
    config = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    backbone = make_tiny_model(architecture)
    model = get_peft_model(backbone, LoraConfig(**config), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**config))
    model.set_adapter(names[-1])
    return model


@pytest.mark.parametrize("names", [("default", "mine"), ("mine",), ("mine", "other", "default")])
def test_the_active_adapter_is_pruned_whatever_its_name(make_tiny_model, tmp_path, names):
    def others() -> dict:
        return {k: p.clone() for k, p in model.named_parameters() if "lora_" in k and f".{names[-1]}." not in k}

    model = own_adapters(make_tiny_model, *names)
    before, controller = others(), controller_for({}, mask=MaskSettings("input_aware"), folder=tmp_path)
    train_transformers(model, tmp_path, controller)
    assert same(before, others())
    factors = {key: p for key, p in model.named_parameters() if f".{names[-1]}." in key}
    assert {id(factor) for factor in factors.values()} == {id(weight) for weight in controller.masks.weights.values()}
    for factor in factors.values():
        assert int((factor == 0).sum()) == prune_count(controller.prune_ratio, factor.numel())
    assert all(reward != 0 for row in read_rows(tmp_path / "rounds.jsonl") for reward in row["rewards"])


EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "architecture": "qwen3_moe"}


@pytest.mark.parametrize("score", ["input_aware", "gradient_of_delta"])
def test_experts_whose_inputs_are_not_seen_are_named(make_tiny_model, tmp_path, score):
    controller = controller_for({}, mask=MaskSettings(score))
    with pytest.raises(AdapterError, match=rf"^score '{score}' .* model.layers.0.mlp.experts.*'magnitude'") as error:
        train_transformers(own_adapters(make_tiny_model, "default", **EXPERTS), tmp_path, controller)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("more", [EXPERTS, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_every_lora_weight_is_pruned(make_tiny_model, tmp_path, more):
    model = own_adapters(make_tiny_model, "default", **more)
    controller, watch = controller_for({}), None
    train_transformers(model, tmp_path, controller, [watch := Watch(controller)])
    assert watch.steps == 12
    factors = {key: factor for key, factor in model.named_parameters() if "lora_" in key}
    assert len(factors) == len(controller.masks.weights) > 4
    for factor in factors.values():
        assert int((factor == 0).sum()) == prune_count(controller.prune_ratio, factor.numel())


@pytest.mark.parametrize(
    ("config", "weight"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        (
            {"target_modules": ["c_attn"], "architecture": "gpt2", "fan_in_fan_out": True, "lora_bias": True},
            r"lora_B\S*\.bias",
        ),
    ],
)
def test_lora_weights_that_no_mask_covers_are_named(make_tiny_model, tmp_path, config, weight):
    with pytest.raises(AdapterError, match=rf"^\S+\.0\.\S+\.{weight}.* belongs to the adapter.*plain LoRA") as error:
        train_transformers(own_adapters(make_tiny_model, "default", **config), tmp_path, controller_for({}))
    assert "\n" not in str(error.value)


def test_what_is_trained_beside_lora_stays_whole(make_tiny_model, tmp_path):
    model = own_adapters(make_tiny_model, "default", modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    before = head.detach().clone()
    controller = controller_for({})
    train_transformers(model, tmp_path, controller)
    assert (head != before).any()
    assert (head != 0).all()
    assert controller.masks.sparsity() > 0


@pytest.mark.parametrize("trainer_name", ["transformers", "trl"])
@pytest.mark.parametrize("training", ["first", "second"])
def test_a_training_of_any_trainer_that_trains_nothing_stops_at_its_first_step(
    make_tiny_model, tiny_tokenizer, tmp_path, trainer_name, training
):
    model = own_adapters(make_tiny_model, "default")
    controller = controller_for({})
    if training == "second":
        train_with(trainer_name, model, tmp_path, tiny_tokenizer, controller)
    model.get_base_model().model.norm.register_forward_hook(lambda *call: call[-1].detach() + 0.0 * call[-1])
    with pytest.raises(GraspError, match="no LoRA weight has a gradient, so nothing would be trained; likely causes"):
        train_with(trainer_name, model, tmp_path, tiny_tokenizer, controller)


@pytest.mark.parametrize("trainer_name", TRAINERS)
def test_a_frozen_adapter_is_named_by_any_trainer(make_tiny_model, tiny_tokenizer, tmp_path, trainer_name):
    model = own_adapters(make_tiny_model, "default").requires_grad_(False)
    with pytest.raises(GraspError, match=r"the adapter is frozen: .*is_trainable=True"):
        train_with(trainer_name, model, tmp_path, tiny_tokenizer, controller_for({}))


# A trainer of one's own


def test_from_rows_builds_the_measured_default(make_tiny_model, tiny_tokenizer, tmp_path):
    rows = [{"prompt": f"What is {i}?", "completion": f" {i}."} for i in range(14)]
    with adapted(make_tiny_model) as (model, weights):
        controller = GraspController.from_rows(rows, tiny_tokenizer, segments=segments_of(weights), folder=tmp_path)
        with pytest.raises(ValueError, match="no round was measured yet"):
            _ = controller.learned
        train_transformers(model, tmp_path, controller)
    assert controller.settings == Controller()
    written = read_rows(tmp_path / "rounds.jsonl")
    assert [row["step"] for row in written] == [0, 12]  # before training and after the epoch of 12 steps
    assert {(len(row["baseline_losses"]), len(row["candidate_losses"][0])) for row in written} == {(14, 12)}
    assert controller.learned == controller.search.best_ratio()
    assert controller.learned.ratio == controller.search.current_ratio
    whole = GraspController.from_rows(rows[:5], tiny_tokenizer, Controller(Gaussian(), Rounds(4), "best_reward"))
    assert whole.micro_dev.at(0) is whole.micro_dev.at(1)
    assert GraspController.from_rows(rows, tiny_tokenizer, "paper").settings == PRESETS["paper"]
    with pytest.raises(ValueError, match="preset 3 is a int; it must be a Controller"):
        GraspController.from_rows(rows, tiny_tokenizer, 3)
    with attached(make_tiny_model("llama"), weights) as model:
        slip = {f"base_model.model.{name}": parts for name, parts in segments_of(weights).items()}
        astray = GraspController.from_rows(rows, tiny_tokenizer, segments=slip)
        with pytest.raises(
            AdapterError, match=r"segments names 'base_model\.model\.\S+', which the adapter does not have"
        ):
            train_transformers(model, tmp_path / "slip", astray)


@pytest.mark.parametrize(
    ("changed", "message"), [("eos_token", "another EOS token than"), ("chat_template", "another chat template than")]
)
def test_rows_are_encoded_with_what_the_trainer_trains_on(make_tiny_model, tiny_tokenizer, tmp_path, changed, message):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    ways = {"eos_token": {"eos_token": "<unk>"}, "chat_template": {"chat_template_path": str(tmp_path / "chat.jinja")}}
    backbone = make_tiny_model("llama")
    with attached(backbone, merged_adapter(backbone, "llama")) as model:
        early = GraspController.from_rows(ROWS, tokenizer)
        trainer = make_sft_trainer(model, tmp_path, tokenizer, **ways[changed])
        with pytest.raises(
            DataError, match=rf"^the trainer's tokenizer has {message} .* with trainer\.processing_class"
        ):
            early.add_to(trainer)
        assert early not in trainer.callback_handler.callbacks
        late = GraspController.from_rows(ROWS, trainer.processing_class).add_to(trainer)
        assert late in trainer.callback_handler.callbacks


def test_zeros_that_an_earlier_training_left_are_told(make_tiny_model, tmp_path, caplog):
    """As where a cell of a notebook runs again; not where a merge has zeros of its own, or the stash is put back."""
    backbone = make_tiny_model("llama")
    weights = merged_adapter(backbone, "llama")
    for pair in weights.values():
        pair.A[0], pair.B[:, 0] = 0.0, 0.0
    with attached(backbone, weights) as model:
        controller = controller_for(weights, kind="spread")
        train_transformers(model, tmp_path, controller)
        train_transformers(model, tmp_path, controller)
        assert not caplog.messages
        train_transformers(model, tmp_path, controller_for(weights, kind="spread"))
    with attached(backbone, weights) as model:
        train_ours(model, tmp_path, callbacks=[PrunedTraining(0.3, ProbeSet(MICRO_DEV, PAD))])
    [told] = caplog.messages
    assert " % of the adapter's weights are zero already, left by an earlier training under masks; load the" in told
    assert int(told.split()[0]) > 15


def test_a_training_without_rounds_ends_before_it_begins(make_tiny_model, tmp_path, caplog):
    backbone = make_tiny_model("llama")
    weights = merged_adapter(backbone, "llama")
    with (
        attached(backbone, weights) as model,
        pytest.raises(GraspError, match=r"no round falls into \d+ steps; lower rounds"),
    ):
        train_ours(model, tmp_path, controller_for(weights, every=500))
    with attached(backbone, weights) as model:
        train_ours(model, tmp_path, controller_for(weights, every=500, policy=Spread()))
    assert "the only round of this training comes before its first step" in caplog.text


def test_a_checkpoint_holds_every_loss_once_and_a_search_that_differs_is_refused(model, weights, tmp_path):
    first = controller_for(weights)
    train_ours(model, tmp_path, first)
    values, tensors = first.state()
    loss = repr(first.search.history[0].baseline_losses[0])
    assert json.dumps(values).count(loss) == 1
    second = controller_for(weights)
    second._masks = MaskSet(live_pairs(model, segments_of(weights)), MaskSettings())
    second.restore(json.loads(json.dumps(values)), tensors)
    assert searched(second) == searched(first)
    changes = {"policy.candidates": 4, "rule": "best_reward", "policy.seed": 7, "rounds.every": 4}
    for name, change in changes.items():
        other = controller_for(weights, **{name.rpartition(".")[2]: change})
        other._masks = second.masks
        with pytest.raises(GraspError, match=f"training began with {name} .* and resumes with '?{change}'?; give it"):
            other.restore(values, tensors)
    other = controller_for(weights)
    other._masks = second.masks
    other.micro_dev = ProbeSet([replace(one, completion_ids=(3, 3)) for one in other.micro_dev._examples], 0)
    with pytest.raises(GraspError, match="training began with probed rows of hash"):
        other.restore(values, tensors)
    values["rows"]["rounds.jsonl"][1]["policy_mean"] += 1e-12
    with pytest.raises(GraspError, match="round 2 of the checkpoint led to ratio"):
        second.restore(values, tensors)

"""Masks that hold through training and rounds that tell the truth, in three trainers: ours, transformers' and TRL's."""

import copy
import itertools
import json
import math
import statistics
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from random_examples import TARGETS, Example, assert_counts, factors, make_examples, random_like, read_rows
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grasp_lora.data.encode import encode_rows
from grasp_lora.errors import AdapterError, DataError, GraspError, ProbeError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.masks import RANK_DIMENSION, MaskSet, MaskSettings, prune_count, survival
from grasp_lora.method.merging import MergeSettings, merge
from grasp_lora.method.rules import RatioEstimate, Round
from grasp_lora.method.search import POLICIES, PRESETS, Controller, Decision, GrpoPolicy, PaperPolicy, Rounds
from grasp_lora.models import generation
from grasp_lora.models.adapters import attached, fresh_adapter
from grasp_lora.models.live import adapter_weights, live_pairs, segments_of
from grasp_lora.models.loss import collate
from grasp_lora.models.model_settings import LoraSettings
from grasp_lora.storage.checkpoints import read_state
from grasp_lora.training import probes as probing
from grasp_lora.training import pruned as pruned_module
from grasp_lora.training import trainer as finetune_module
from grasp_lora.training.controller import GraspController
from grasp_lora.training.probes import ProbeSet, ProbesInTurn
from grasp_lora.training.pruned import PrunedTraining
from grasp_lora.training.trainer import finetune
from grasp_lora.training.training_settings import TrainingSettings

both_policies = pytest.mark.parametrize("kind", ["paper", "grpo"])
TRAINERS = ["ours", "transformers", "trl"]
ANY_TRAINER = ["transformers", "trl"]
PAD = 0
TRAIN, MICRO_DEV = make_examples(12), make_examples(5, 1, "m")
PROBES = ProbeSet(MICRO_DEV)
ROWS = [{"prompt": f"What is {i} + {i}?", "completion": f" It is {2 * i}."} for i in range(12)]
EVERY_FIFTH = {"save_strategy": "steps", "save_steps": 5}


@contextmanager
def adapted(make_tiny_model, architecture: str = "llama", dropout: float = 0.0):
    """A tiny model with a merge of a source of rank 3 and a target of rank 2, no weight at zero; and the merge."""
    backbone, parts = make_tiny_model(architecture), []
    for seed, rank in ((1, 3), (2, 2)):
        with fresh_adapter(backbone, LoraSettings(rank=rank, target_modules=TARGETS[architecture]), seed) as model:
            parts.append(random_like(model, torch.Generator().manual_seed(seed), 0.3))
    weights = merge(parts, MergeSettings())
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


def own_adapters(make_tiny_model, *names: str, architecture: str = "llama", **config) -> PeftModel:
    """A tiny model with LoRA adapters of these names, none of whose factors is zero; the last one is active."""
    config = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(make_tiny_model(architecture), LoraConfig(**config), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**config))
    model.set_adapter(names[-1])
    return model


def controller_for(
    weights, probes=PROBES, mask=None, folder=None, every=3, patience=None, kind="paper", rule="surrogate_at_end",
    policy=None, **changes,
):  # fmt: skip
    policy = policy or POLICIES[kind](**changes)
    rounds = Rounds(every, policy.regime == "each_step", patience=patience)
    return GraspController(
        probes, Controller(policy, rounds, rule), mask=mask, segments=segments_of(weights), folder=folder
    )


def pruned_for(weights, ratio=0.5, mode="hold", score="magnitude") -> PrunedTraining:
    return PrunedTraining(ratio, PROBES, MaskSettings(score), mode, segments_of(weights))


def train_ours(model, folder, controller=None, dev=(), callbacks=(), **changes):
    settings = TrainingSettings(**{"epochs": 1, "learning_rate": 1e-2, "patience": 99, **changes})
    more = {"folder": folder / "run", "controller": controller, "callbacks": callbacks}
    return finetune(model, TRAIN, dev, settings, pad_id=PAD, seed=1, **more)


def make_trainer(model, folder, callback=None, tokenizer=None, kind=Trainer, **changes) -> Trainer:
    """A trainer of transformers, with a tokenizer TRL's, and a controller or another callback added."""
    common = {
        "output_dir": str(folder / "run"), "num_train_epochs": 1, "per_device_train_batch_size": 1, "logging_steps": 1,
        "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
    }  # fmt: skip
    if tokenizer is not None:
        from trl import SFTConfig, SFTTrainer

        common |= {"dataloader_pin_memory": False, "bf16": False, "activation_checkpointing": False}
        args = SFTConfig(**{**common, **changes})
        trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    else:
        args = TrainingArguments(**{**common, "remove_unused_columns": False, **changes})
        data = {"train_dataset": TRAIN, "eval_dataset": TRAIN, "data_collator": lambda batch: collate(batch, PAD)}
        trainer = kind(model, args, **data)
    if isinstance(callback, PrunedTraining):
        callback.add_to(trainer)
    elif callback is not None:
        trainer.add_callback(callback)
    return trainer


def train_any(model, folder, controller, callbacks=(), tokenizer=None, resume=None, **changes) -> Trainer:
    """Train with transformers or TRL; the callbacks stand behind the controller."""
    trainer = make_trainer(model, folder, controller, tokenizer, **changes)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume and str(folder / "run" / f"checkpoint-{resume}"))
    return trainer


def train_with(name, model, folder, tokenizer, controller, callbacks=()) -> None:
    if name == "ours":
        train_ours(model, folder, controller, callbacks=callbacks)
    else:
        train_any(model, folder, controller, callbacks, tokenizer if name == "trl" else None)


def searched(controller: GraspController) -> tuple:
    search = controller.search
    return search.mean, search.std, search.current_ratio, search.history


def dense(masks: MaskSet) -> dict:
    """All weights, those that are masked with the values that they had."""
    return {key: torch.where(masks.keep[key], one, masks.stash[key]).detach() for key, one in masks.weights.items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def same_adapters(one: AdapterWeights, other: AdapterWeights) -> bool:
    return all(torch.equal(pair.A, other[k].A) and torch.equal(pair.B, other[k].B) for k, pair in one.items())


def assert_pruned(pairs, ratio: float) -> None:
    """Each group has exactly so many zeros."""
    for row in survival(pairs):
        assert row["weights"] - row["kept"] == prune_count(ratio, row["weights"])


class Watch(TrainerCallback):
    """When the next step begins, and at the end: the mask is on, exactly as far as it says."""

    def __init__(self, pruned: PrunedTraining) -> None:
        self.pruned = pruned
        self.ratios: list[float] = []
        self.masks: list[torch.Tensor] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self.on_train_end(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        masks, ratio = self.pruned.masks, self.pruned.prune_ratio
        live, moments = live_pairs(kwargs["model"]), kwargs["optimizer"].state
        assert_counts(masks.pairs, masks.keep, ratio)
        for (module, factor), keep in masks.keep.items():
            weight = masks.weights[module, factor]
            assert weight is getattr(live[module], factor)
            assert torch.equal(weight != 0, keep)
            if self.pruned.mode == "hold":
                for name in ("exp_avg", "exp_avg_sq"):
                    assert not moments[weight][name][~keep].any()
                    assert moments[weight][name][keep].any()
        self.ratios.append(ratio)
        self.masks.append(torch.cat([keep.flatten() for keep in masks.keep.values()]))
        assert masks.ratio == ratio
        assert masks.sparsity() == pytest.approx((~self.masks[-1]).double().mean().item(), abs=1e-12)


@dataclass(frozen=True)
class NeverCommits(PaperPolicy):
    """Draws and learns as always, but takes every reward for a negative one."""

    def decide(self, search, measured):
        return Decision(measured.rewards, False, search.current_ratio)


@dataclass(frozen=True)
class Scripted(PaperPolicy):
    """Commits these ratios, one a round."""

    ratio_min: float = 0.0
    ratios: tuple[float, ...] = (0.5, 0.2, 0.7, 0.0)

    def decide(self, search, measured):
        return Decision(measured.rewards, True, self.ratios[len(search.history) - 1], True)


@dataclass(frozen=True)
class InForce(GrpoPolicy):
    """Its first candidate is the ratio in force."""

    def draw(self, search, generator):
        return [search.current_ratio, 0.3, 0.6]


# In three trainers


@both_policies
@pytest.mark.parametrize("trainer_name", ANY_TRAINER)
def test_a_resumed_training_of_any_trainer_ends_in_the_same_bits(
    make_tiny_model, tiny_tokenizer, tmp_path, trainer_name, kind
):
    def train(resume: int | None) -> tuple[list[torch.Tensor], tuple, list[dict]]:
        tokenizer = tiny_tokenizer if trainer_name == "trl" else None
        with adapted(make_tiny_model, dropout=0.2) as (model, weights):
            controller = controller_for(weights, mask=MaskSettings("input_aware"), folder=tmp_path, kind=kind)
            train_any(model, tmp_path, controller, tokenizer=tokenizer, resume=resume, **EVERY_FIFTH)
            left = [factor.detach().clone() for factor in factors(model)]
        return left, searched(controller), read_rows(tmp_path / "rounds.jsonl")

    whole, resumed = train(resume=None), train(resume=5)
    assert all(torch.equal(one, other) for one, other in zip(whole[0], resumed[0], strict=True))
    assert whole[1:] == resumed[1:]
    assert [row["step"] for row in resumed[2]] == ([0] if kind == "grpo" else []) + [3, 6, 9, 12]


@pytest.mark.parametrize(
    ("trainer_name", "architecture"),
    [*(("transformers", name) for name in TARGETS), ("ours", "llama"), ("ours", "gpt2"), ("trl", "llama")],
)
def test_masks_hold_and_rounds_add_up(make_tiny_model, tiny_tokenizer, tmp_path, architecture, trainer_name):
    probes = ProbeSet.from_rows(ROWS[:5], tiny_tokenizer) if trainer_name == "trl" else PROBES
    with adapted(make_tiny_model, architecture, dropout=0.05) as (model, weights):
        controller = controller_for(weights, probes, folder=tmp_path)
        watch = Watch(controller)
        train_with(trainer_name, model, tmp_path, tiny_tokenizer, controller, [watch])
        assert len(watch.ratios) == 12
        rounds, timings = (read_rows(tmp_path / f"{name}.jsonl") for name in ("rounds", "timings"))
        assert probes.losses(model) != rounds[0]["baseline_losses"]  # those were of the weights that the round found
    assert len(rounds) == len(timings) == len(controller.search.history)
    assert [(row["round"], row["step"]) for row in rounds] == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert [row["epoch"] for row in rounds] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    ratio = 0.40
    for row, timing in zip(rounds, timings, strict=True):
        assert (timing["round"], timing["step"]) == (row["round"], row["step"])
        assert min(timing["probe_seconds"], timing["train_seconds"]) > 0
        assert {len(losses) for losses in [row["baseline_losses"], *row["candidate_losses"]]} == {5}
        for _, reward, losses in zip(row["candidates"], row["rewards"], row["candidate_losses"], strict=True):
            assert reward == pytest.approx((sum(row["baseline_losses"]) - sum(losses)) / 5, abs=1e-9)
        assert row["ratio_before"] == ratio
        assert row["committed"] == (max(row["rewards"]) >= 0)
        assert row["committed"] or row["ratio"] == ratio
        assert abs(row["ratio"] - ratio) <= 0.10 + 1e-9
        ratio = row["ratio"]
        assert ratio == watch.ratios[row["step"] - 1]
        assert row["measured_sparsity"] == pytest.approx(ratio, abs=0.02)
    assert ratio == controller.search.current_ratio == controller.prune_ratio
    assert (rounds[-1]["policy_mean"], rounds[-1]["policy_std"]) == (controller.search.mean, controller.search.std)


@pytest.mark.parametrize("kind", ["grpo", "paper", "fixed"])
@pytest.mark.parametrize("trainer_name", TRAINERS)
def test_a_step_is_clipped_by_the_norm_of_what_it_trains(
    make_tiny_model, tiny_tokenizer, tmp_path, caplog, trainer_name, kind
):
    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients = [weight.grad for weight in kwargs["model"].parameters() if weight.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    norms: list[float] = []
    tokenizer = tiny_tokenizer if trainer_name == "trl" else None
    with adapted(make_tiny_model) as (model, weights):
        pruned = pruned_for(weights, 0.8) if kind == "fixed" else controller_for(weights, kind=kind)
        if trainer_name == "ours":
            train_ours(model, tmp_path, callbacks=[pruned, Norms()], max_grad_norm=1e-4)
        else:
            train_any(model, tmp_path, pruned, [Norms()], tokenizer, max_grad_norm=1e-4)
    assert norms == pytest.approx([1e-4] * 12, rel=1e-2)
    assert "clips" not in caplog.text


def test_a_step_that_is_clipped_before_it_is_masked_is_said(model, weights, tmp_path, caplog):
    for norm in (0.0, 1.0):
        assert "add_to(trainer)" not in caplog.text
        trainer = make_trainer(model, tmp_path, max_grad_norm=norm)
        trainer.add_callback(pruned_for(weights))
        trainer.train()
    assert "clips; use add_to(trainer)" in caplog.text


def test_a_callback_that_was_taken_away_masks_nothing_more(model, weights, tmp_path):
    pruned = pruned_for(weights)
    trainer = make_trainer(model, tmp_path, pruned)
    trainer.train()
    trainer.remove_callback(pruned)
    trainer.train()
    assert not pruned.masks.are_on()


def test_mixed_precision_and_checkpointing_as_trl_has_them_by_default(model, weights, tiny_tokenizer, tmp_path):
    probes, trl = ProbeSet.from_rows(ROWS[:5], tiny_tokenizer), {"bf16": True, "activation_checkpointing": True}
    controller = controller_for(weights, probes, MaskSettings("input_aware"), folder=tmp_path)
    watch = Watch(controller)
    train_any(model, tmp_path, controller, [watch], tiny_tokenizer, **trl)
    assert len(watch.ratios) == 12
    assert {weight.dtype for weight in controller.masks.weights.values()} == {torch.float32}
    assert len(read_rows(tmp_path / "rounds.jsonl")) == 4
    assert all(math.isfinite(loss) for loss in probes.losses(model))


@pytest.mark.parametrize("merges", [(), ("?", "Ġ")])
def test_rows_are_tokenised_as_trl_tokenises_them(model, tiny_tokenizer, tmp_path, merges):
    from tokenizers import models

    tokenizer = copy.deepcopy(tiny_tokenizer)
    if merges:  # the end of a prompt and the beginning of its answer become one token
        vocabulary = tokenizer.get_vocab()
        vocabulary["".join(merges)] = merged = len(vocabulary)
        tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[merges], unk_token="<unk>")
    encoded = encode_rows(ROWS, tokenizer)
    assert not merges or all(one.completion_ids[0] == merged for one in encoded)
    trained_on = make_trainer(model, tmp_path, tokenizer=tokenizer).train_dataset
    for ours, theirs in zip(encoded, trained_on, strict=True):
        assert [*ours.prompt_ids, *ours.completion_ids] == theirs["input_ids"]
        labelled = zip(theirs["input_ids"], theirs["labels"], strict=True)
        assert list(ours.completion_ids) == [token for token, label in labelled if label != -100]


@pytest.mark.parametrize("trainer_name", ANY_TRAINER)
def test_trackers_receive_the_rounds_and_the_trainers_own_log_keeps_its_rows(
    make_tiny_model, tiny_tokenizer, tmp_path, trainer_name, monkeypatch
):
    # A log call within a step ends the trainer's wish to log its loss; TRL's also empties its running metrics.
    logs = []
    for rounds in (True, False):
        if not rounds:
            monkeypatch.setattr(GraspController, "_round_follows", lambda *_: False)
        with adapted(make_tiny_model) as (model, weights):
            controller = controller_for(weights, policy=NeverCommits(), folder=tmp_path / str(rounds))
            tokenizer = tiny_tokenizer if trainer_name == "trl" else None
            logs.append(train_any(model, tmp_path, controller, tokenizer=tokenizer).state.log_history)
    own = [[{k: v for k, v in row.items() if "runtime" not in k} for row in log if "loss" in row] for log in logs]
    assert [row["step"] for row in own[0]] == list(range(1, 13))
    assert own[0] == own[1]
    rounds = read_rows(tmp_path / "True" / "rounds.jsonl")
    told = [row for row in logs[0] if "grasp/prune_ratio" in row]
    assert [row["step"] for row in told] == [3, 6, 9, 12]
    for row, measured in zip(told, rounds, strict=True):
        for key in ("policy_mean", "policy_std", "measured_sparsity"):
            assert row[f"grasp/{key}"] == measured[key]
        assert row["grasp/prune_ratio"] == measured["ratio"]
        assert row["grasp/best_reward"] == max(measured["rewards"])
        assert row["grasp/micro_dev_loss"] == pytest.approx(sum(measured["baseline_losses"]) / 5)
        for name in ("candidate", "reward", "advantage"):
            assert [row[f"grasp/{name}_{number}"] for number in (1, 2, 3)] == measured[f"{name}s"]
        assert measured["advantages"] == pytest.approx(
            [r - statistics.fmean(measured["rewards"]) for r in measured["rewards"]]
        )
        assert all(key.startswith("grasp/") or key in ("step", "epoch") for key in row)


@pytest.mark.parametrize("trainer_name", ANY_TRAINER)
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
                self.dense = dense(masks)

    def measure(values) -> list[float]:
        for key, value in values.items():
            controller.masks.weights[key].data.copy_(value)
        return ProbeSet(MICRO_DEV).losses(model)

    keep = Keep()
    controller = controller_for(weights, folder=tmp_path, mask=MaskSettings(score))
    train_ours(model, tmp_path, controller, callbacks=[keep])
    row = read_rows(tmp_path / "rounds.jsonl")[0]
    assert measure(keep.pruned) == pytest.approx(row["baseline_losses"], abs=1e-5)
    for candidate, losses in zip(row["candidates"], row["candidate_losses"], strict=True):
        controller.masks.commit(candidate, rankings[1])  # the first is that of the beginning
        pruned = {key: torch.where(controller.masks.keep[key], value, 0.0) for key, value in keep.dense.items()}
        assert measure(pruned) == pytest.approx(losses, abs=1e-5)


def test_a_candidate_at_the_ratio_in_force_has_the_baseline_of_its_own_examples(model, weights, tmp_path):
    probes = ProbesInTurn(make_examples(7, 1, "m"), count=3, seed=5)
    controller = controller_for(weights, probes, folder=tmp_path, patience=99, policy=InForce())
    train_ours(model, tmp_path, controller)
    for row in read_rows(tmp_path / "rounds.jsonl"):
        assert row["candidate_losses"][0] == [row["baseline_losses"][place] for place in row["places"]]
        assert row["rewards"][0] == 0.0


def test_data_that_are_streamed_have_one_epoch(model, weights, tmp_path):
    class Streamed(IterableDataset):
        def __iter__(self):
            yield from TRAIN

    controller = controller_for(weights, every="epoch", folder=tmp_path)
    trainer = make_trainer(model, tmp_path, controller, max_steps=4)
    trainer.train_dataset = Streamed()
    trainer.train()
    assert [row["step"] for row in read_rows(tmp_path / "rounds.jsonl")] == [4]


@pytest.mark.parametrize("compared_by", ["nothing", "patience", "surrogate"])
@pytest.mark.parametrize("kind", ["grpo", "paper"])
def test_examples_take_turns_and_a_baseline_is_of_all_where_rounds_are_compared(
    model, weights, tmp_path, monkeypatch, kind, compared_by
):
    probed, measure = [], ProbeSet.losses
    monkeypatch.setattr(ProbeSet, "losses", lambda self, *rest: probed.append(self.ids) or measure(self, *rest))
    how = {"nothing": {}, "patience": {"patience": 99}, "surrogate": {"rule": "surrogate"}}
    probes = ProbesInTurn(make_examples(7, 1, "m"), count=3, seed=5)
    controller = controller_for(weights, probes, folder=tmp_path, kind=kind, **how[compared_by])
    train_ours(model, tmp_path, controller)
    rows = read_rows(tmp_path / "rounds.jsonl")
    whole, turns = probes.whole.ids, [probes.at(number).ids for number in range(len(rows))]
    # The baseline and the candidates of a round on the same ones, or the baseline on all.
    count = 4 if kind == "grpo" else 3
    expected = [[turn if compared_by == "nothing" else whole, *[turn] * count] for turn in turns]
    assert probed == list(itertools.chain(*expected))
    for turn, row, measured in zip(turns, rows, controller.search.history, strict=True):
        baseline = row["baseline_losses"]
        assert [whole[place] for place in row["places"]] == turn
        if compared_by != "nothing":
            assert len(baseline) == 7
            baseline = [baseline[place] for place in row["places"]]
        assert {len(losses) for losses in [baseline, *row["candidate_losses"]]} == {3}
        rewards = [statistics.fmean(baseline) - statistics.fmean(losses) for losses in row["candidate_losses"]]
        assert row["rewards"] == pytest.approx(rewards)
        assert measured == Round.from_json(row)


@pytest.mark.parametrize(
    ("architecture", "score"),
    [*((name, "magnitude") for name in TARGETS), ("llama", "input_aware"), ("gpt2", "gradient_of_delta")],
)
def test_probing_without_a_commit_does_not_change_the_training(
    make_tiny_model, tmp_path, architecture, score, monkeypatch
):
    left = []
    for rounds in (6, 0):
        if not rounds:
            monkeypatch.setattr(GraspController, "_round_follows", lambda *_: False)
        with adapted(make_tiny_model, architecture, dropout=0.3) as (model, weights):
            controller = controller_for(weights, mask=MaskSettings(score), every=2, policy=NeverCommits())
            train_ours(model, tmp_path, controller)
            assert len(controller.search.history) == rounds
            left.append(adapter_weights(model))
    assert same_adapters(*left)


def test_ratios_that_rise_and_fall_are_followed_exactly(model, weights, tmp_path):
    controller = controller_for(weights, policy=Scripted())
    watch = Watch(controller)
    train_any(model, tmp_path, controller, [watch])
    assert watch.ratios == [0.4, 0.4, 0.5, 0.5, 0.5, 0.2, 0.2, 0.2, 0.7, 0.7, 0.7, 0.0]
    assert watch.masks[-1].all()  # revived ones are back at their values: the watch saw none at zero
    assert [1 - float(mask.float().mean()) for mask in watch.masks] == pytest.approx(watch.ratios, abs=0.01)


def test_a_probe_that_fails_names_the_ratio_and_the_example(model, weights, tmp_path, monkeypatch):
    measure, calls = probing.losses_after, []

    def fail(*arguments):
        losses = measure(*arguments)
        calls.append(len(losses))
        return losses if len(calls) < 3 else losses.index_fill(0, torch.tensor([1]), math.inf)

    probes = ProbeSet([Example(f"m{i}", (5, 6, 7), (8, 2)) for i in range(3)])
    controller = controller_for(weights, probes, folder=tmp_path)
    monkeypatch.setattr(probing, "losses_after", fail)
    with pytest.raises(ProbeError, match=r"^the loss of example m1 is inf[^\n]+$"):
        train_ours(model, tmp_path, controller)
    assert len(calls) == 3  # baseline, first candidate, second candidate
    # The committed mask is on again, not the candidate's; nothing was learned.
    assert controller.masks.sparsity() == pytest.approx(0.4, abs=0.01)
    assert not controller.search.history
    assert not any(module.training for module in model.get_base_model().modules())
    assert read_rows(tmp_path / "rounds.jsonl") == []


# A fixed ratio


def test_modes_and_ratios_that_do_not_exist_are_an_error():
    estimate = RatioEstimate(0.4, 0.3, 0.5, "best_reward", 3)
    for ratio, mode in ((0.5, "keep"), (40, "hold"), (math.nan, "hold"), (estimate, "hold")):
        with pytest.raises(ValueError, match=r"prune_ratio is .* and mode '\w+'; give a fraction in .* learned\.ratio"):
            PrunedTraining(ratio, PROBES, mode=mode)
    assert PrunedTraining(torch.tensor(0.5), PROBES).prune_ratio == 0.5


@pytest.mark.parametrize("mode", ["hold", "reselect"])
@pytest.mark.parametrize(
    ("architecture", "score"),
    [*((name, "gradient_of_delta") for name in TARGETS), ("llama", "magnitude"), ("gemma3", "input_aware")],
)
def test_a_fixed_ratio_holds_after_every_step(make_tiny_model, tmp_path, architecture, mode, score):
    with adapted(make_tiny_model, architecture, dropout=0.05) as (model, weights):
        pruned = pruned_for(weights, 0.37, mode, score)
        watch = Watch(pruned)
        train_ours(model, tmp_path, callbacks=[pruned, watch], learning_rate=5e-2)
    assert len(watch.ratios) == 12
    changed = any(not torch.equal(mask, watch.masks[0]) for mask in watch.masks)
    assert changed == (mode == "reselect")


def test_reselect_takes_the_least_important_of_the_weights_as_they_are(model, weights, tmp_path):
    class Check(TrainerCallback):
        steps = 0

        def on_optimizer_step(self, args, state, control, **kwargs):  # before the pruning
            self.weights = {key: weight.detach().clone() for key, weight in pruned.masks.weights.items()}

        def on_step_end(self, args, state, control, **kwargs):
            for (module, factor), keep in pruned.masks.keep.items():
                sizes, along = [segment.rank for segment in weights[module].segments], RANK_DIMENSION[factor]
                found = self.weights[module, factor]
                assert torch.equal(pruned.masks.weights[module, factor], found * keep)
                for part, mask in zip(found.split(sizes, along), keep.split(sizes, along), strict=True):
                    assert part[~mask].abs().max() <= part[mask].abs().min()
            self.steps += 1

    pruned, check = pruned_for(weights, mode="reselect"), Check()
    train_ours(model, tmp_path, callbacks=[check, pruned])
    assert check.steps == 12


def test_a_held_mask_survives_a_step_that_moves_every_weight(model, weights, tmp_path):
    # Gradients of masked weights are stopped, so Adam leaves them alone; an optimizer with noise of its own does not.
    class Disturb(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            for weight in pruned.masks.weights.values():
                weight.data += 1.0

    pruned = pruned_for(weights)
    watch = Watch(pruned)
    train_ours(model, tmp_path, callbacks=[Disturb(), pruned, watch])
    assert len(watch.ratios) == 12


BEST = [(0, [1.0, 2.0, 3.0, 4.0, 5.0]), (6, [3.0, 2.0, 1.0, 4.0, 5.0]), (12, [5.0, 4.0, 3.0, 2.0, 1.0])]


@pytest.mark.parametrize("by", ["hold", "reselect", "controller"])
@pytest.mark.parametrize(("best_step", "losses"), BEST)
def test_the_best_weights_are_pruned_exactly(model, weights, tmp_path, monkeypatch, by, best_step, losses):
    remaining = iter(losses)

    class Measured(ProbeSet):  # the dev set; probes and calibration measure as always
        def losses(self, model, collector=None):
            return [next(remaining)] * len(self)

    monkeypatch.setattr(finetune_module, "ProbeSet", Measured)
    controller = controller_for(weights, policy=Scripted()) if by == "controller" else None
    callbacks = [] if controller else [pruned_for(weights, mode=by)]
    result = train_ours(model, tmp_path, controller, MICRO_DEV[:2], callbacks, evaluate_every=0.25)  # each third step
    assert result.best_step == best_step
    ratio = {0: 0.4, 6: 0.2, 12: 0.0}[best_step] if controller else 0.5
    assert_pruned(live_pairs(model, segments_of(weights)), ratio)


def test_a_ratio_of_zero_trains_as_if_there_were_no_masks(make_tiny_model, tmp_path):
    left = []
    for ratios in ([0.0], []):
        with adapted(make_tiny_model, dropout=0.3) as (model, weights):
            callbacks = [pruned_for(weights, ratio) for ratio in ratios]
            train_ours(model, tmp_path, callbacks=callbacks)
            left.append(adapter_weights(model))
    assert same_adapters(*left)


# When rounds come, and when they end


@pytest.mark.parametrize(
    ("kind", "every", "accumulation", "steps"),
    [("paper", 2, 3, [2, 4, 6, 8]), ("paper", "epoch", 5, [3, 6]), ("grpo", 10, 1, [0, 10, 20, 24])],
)
def test_rounds_count_optimizer_steps(model, weights, tmp_path, kind, every, accumulation, steps):
    controller = controller_for(weights, folder=tmp_path, kind=kind, every=every)
    result = train_ours(model, tmp_path, controller, accumulation=accumulation, epochs=2)
    rows = read_rows(tmp_path / "rounds.jsonl")
    assert [row["step"] for row in rows] == steps
    assert result.steps == steps[-1]
    assert rows[0]["ratio_before"] == 0.4
    assert_pruned(adapter_weights(model, segments_of(weights)), controller.search.current_ratio)


class ScriptedBaselines(ProbeSet):
    """Measures these baselines; candidates are measured as always."""

    def __init__(self, baselines, candidates: int = 4) -> None:
        super().__init__(MICRO_DEV)
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
    probes = ScriptedBaselines(baselines)
    controller = controller_for(weights, probes, folder=tmp_path, kind="grpo", patience=patience)
    result = train_ours(model, tmp_path, controller)
    assert len(read_rows(tmp_path / "rounds.jsonl")) == rounds
    assert result.steps == 3 * (rounds - 1)  # the first round comes before training


def test_a_training_that_patience_had_stopped_stops_again_without_a_round(make_tiny_model, tmp_path):
    """In a trainer of one's own, which saves at the very step that patience stops."""

    def train(resume: int | None) -> tuple[int, list[dict]]:
        with adapted(make_tiny_model) as (model, weights):
            probes = ScriptedBaselines([1.0, *itertools.repeat(9.0, 9)])
            controller = controller_for(weights, probes, folder=tmp_path, kind="grpo", patience=1)
            trainer = train_any(model, tmp_path, controller, resume=resume, save_strategy="steps", save_steps=3)
        return trainer.state.global_step, read_rows(tmp_path / "rounds.jsonl")

    stopped, rounds = train(resume=None)
    assert (stopped, [row["step"] for row in rounds]) == (3, [0, 3])
    assert train(resume=3) == (4, rounds)


def test_a_training_without_rounds_ends_before_it_begins(model, weights, tmp_path):
    with pytest.raises(GraspError, match=r"no round falls into \d+ steps; lower rounds"):
        train_ours(model, tmp_path, controller_for(weights, every=500))


# All ratios together


class WatchSteps(TrainerCallback):
    """The ratio and the weights that each step trains, seen between its begin and its optimizer step."""

    def __init__(self, controller: GraspController) -> None:
        self.controller = controller
        self.ratios: list[float] = []
        self.pruned: list[torch.Tensor] = []
        self.dense: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        masks = self.controller.masks
        self.ratios.append(masks.ratio)
        self.pruned.append(torch.cat([(weight == 0).flatten() for weight in masks.weights.values()]))
        self.dense.append(torch.cat([weight.flatten() for weight in dense(masks).values()]))
        assert all(torch.equal(weight == 0, ~masks.keep[key]) for key, weight in masks.weights.items())


@pytest.mark.parametrize("trainer_name", TRAINERS)
def test_each_step_trains_at_its_own_ratio(make_tiny_model, tiny_tokenizer, tmp_path, trainer_name):
    probes = ProbeSet.from_rows(ROWS[:5], tiny_tokenizer) if trainer_name == "trl" else PROBES
    with adapted(make_tiny_model, dropout=0.05) as (model, weights):
        controller = controller_for(weights, probes, folder=tmp_path, every=4, kind="grpo")
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


def test_the_first_round_sees_the_untrained_adapter(model, weights, tmp_path):
    masks = MaskSet(live_pairs(model, segments_of(weights)), MaskSettings())
    with masks.probe(0.4):
        untrained = PROBES.losses(model)
    train_ours(model, tmp_path, controller_for(weights, folder=tmp_path, every=5, kind="grpo", ratio_init=0.4))
    assert read_rows(tmp_path / "rounds.jsonl")[0]["baseline_losses"] == pytest.approx(untrained, abs=1e-6)


def test_a_weight_that_is_masked_for_a_step_is_not_trained_in_it(model, weights, tmp_path):
    controller = controller_for(weights, every=50, kind="grpo")
    watch = WatchSteps(controller)
    train_ours(model, tmp_path, controller, callbacks=[watch])
    for (before, after), pruned in zip(itertools.pairwise(watch.dense), watch.pruned, strict=False):
        assert torch.equal(before[pruned], after[pruned])
        assert (before[~pruned] != after[~pruned]).any()


# Trainings that go on, are saved, or begin again


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_run_that_holds_no_ratio_is_saved_evaluated_and_reloaded_at_the_policys_ratio(
    make_tiny_model, model, weights, tmp_path, strategy
):
    shares = []

    class Note(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            zeros = torch.cat([(factor == 0).flatten() for factor in factors(model)])
            shares.append((controller.search.current_ratio, zeros.float().mean().item()))

        on_evaluate = on_save

    controller = controller_for(weights, kind="grpo", every=5)
    saving = {"save_strategy": strategy, "save_steps": 4, "eval_strategy": strategy, "eval_steps": 4}
    trainer = train_any(model, tmp_path, controller, [Note()], load_best_model_at_end=True, **saving)
    best = PeftModel.from_pretrained(make_tiny_model("llama"), trainer.state.best_model_checkpoint)
    assert same_adapters(live_pairs(model), live_pairs(best))
    assert len(shares) == (6 if strategy == "steps" else 2)
    for wanted, found in shares:
        assert found == pytest.approx(wanted, abs=0.03)  # each segment of a factor rounds down


class AtTheBeginning(TrainerCallback):
    """Keeps the weights with which a training begins, those included that are pruned at once."""

    def __init__(self, controller: GraspController) -> None:
        self.controller = controller

    def on_train_begin(self, args, state, control, **kwargs):
        masks = self.controller.masks
        self.dense = dense(masks)
        self.pruned = not any(masks.weights[key][~keep].any() for key, keep in masks.keep.items())


@both_policies
def test_a_second_training_begins_dense_with_a_policy_of_its_own_or_takes_up_a_checkpoint(
    model, weights, tmp_path, kind
):
    controller = controller_for(weights, kind=kind, ratio_init=0.5)
    beginning = AtTheBeginning(controller)
    train_any(model, tmp_path, controller)
    first, left = controller.search, dense(controller.masks)
    assert all(weight.all() for weight in left.values())
    trainer = train_any(model, tmp_path, controller, [beginning], **EVERY_FIFTH)
    assert controller.search is not first
    assert len(controller.search.history) == len(first.history) > 0
    assert same(beginning.dense, left)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert beginning.pruned
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
    def train(resume=5, **options) -> None:
        with adapted(make_tiny_model) as (model, weights):
            options = {"segments": segments_of(weights)} | options
            if controls:
                callback = GraspController(PROBES, Controller(PaperPolicy(), Rounds(3), "surrogate_at_end"), **options)
            else:
                callback = PrunedTraining(**{"prune_ratio": 0.4, "calibration": PROBES} | options)
            train_any(model, tmp_path, callback, resume=resume, **EVERY_FIFTH)

    train(resume=None)
    train()
    with pytest.raises(GraspError, match=message):
        train(**changes)


def test_a_checkpoint_of_another_folder_is_refused(make_tiny_model, tmp_path):
    """The masks would be those of the own folder's checkpoint, of the same step."""
    for folder in ("one", "other"):
        with adapted(make_tiny_model) as (model, weights):
            for factor in factors(model):
                factor.data = torch.randn_like(factor)
            train_any(model, tmp_path / folder, pruned_for(weights), **EVERY_FIFTH)
    with adapted(make_tiny_model) as (model, weights):
        trainer = make_trainer(model, tmp_path / "one", pruned_for(weights), **EVERY_FIFTH)
        with pytest.raises(GraspError, match=r"one/run/checkpoint-5, so its masks do not fit them"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "other" / "run" / "checkpoint-5"))


@pytest.mark.parametrize("callback", [
    lambda: PrunedTraining(0.5, PROBES),
    lambda: GraspController(PROBES, Controller()),
    lambda: GraspController(PROBES, Controller(GrpoPolicy(ratio_min=0.0, ratio_init=0.0))),  # it may prune later
])  # fmt: skip
def test_an_untrained_adapter_is_not_pruned_by_position(make_tiny_model, tmp_path, callback):
    with fresh_adapter(make_tiny_model("llama"), LoraSettings(), 0) as model:
        with pytest.raises(GraspError, match=r"all zero in each of its 4 modules.*trained or merged adapter"):
            train_any(model, tmp_path, callback())
        # What is chosen anew after every step has an order from the first step on.
        again = PrunedTraining(0.5, PROBES, mode="reselect")
        train_any(model, tmp_path, again)
        assert again.masks.sparsity() == pytest.approx(0.5, abs=0.05)


def loading_the_best(model, folder, controller, best: int) -> Trainer:
    """A trainer whose checkpoint of step `best` is the best of those of steps 4, 8 and 12."""

    class Evaluated(Trainer):
        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": abs(self.state.global_step - best)}
            self.log(metrics)
            return metrics

    saving = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    return make_trainer(model, folder, controller, kind=Evaluated, load_best_model_at_end=True, **saving)


@both_policies
def test_the_best_checkpoint_brings_its_own_masks_rounds_and_stash(model, weights, tmp_path, caplog, kind):
    controller = controller_for(weights, kind=kind, folder=tmp_path, ratio_init=0.5)
    beginning = AtTheBeginning(controller)
    trainer = loading_the_best(model, tmp_path, controller, best=4)
    trainer.train()
    values, tensors = read_state(tmp_path / "run" / "checkpoint-4", controller.state_name)
    masks, search = controller.masks, controller.search
    rounds = values["rows"]["rounds.jsonl"]
    assert [row["step"] for row in rounds] == ([0, 3] if kind == "grpo" else [3])
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


def test_a_best_checkpoint_that_cannot_be_put_back_or_was_not_is_an_error(
    make_tiny_model, model, weights, tmp_path, monkeypatch
):
    trainer = loading_the_best(own_adapters(make_tiny_model, "mine"), tmp_path, controller_for({}), best=4)
    with pytest.raises(GraspError, match="puts back an adapter named 'default' only, and 'mine' is active"):
        trainer.callback_handler.on_train_begin(trainer.args, TrainerState(), TrainerControl())
    monkeypatch.setattr(Trainer, "_load_best_model", lambda self: None)
    trainer = loading_the_best(model, tmp_path, controller_for(weights, policy=Scripted()), best=4)
    with pytest.raises(GraspError, match=r"^the weights are not those of .*checkpoint-4, so its masks do not fit them"):
        trainer.train()


@pytest.mark.parametrize("change", ["doubled", "trained anew", "reloaded after a failure"])
def test_no_stash_goes_back_on_weights_that_it_was_not_taken_from(model, weights, tmp_path, caplog, change):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if change == "reloaded after a failure":
                raise KeyboardInterrupt

    controller = controller_for(weights, ratio_init=0.5)
    beginning = AtTheBeginning(controller)
    with pytest.raises(KeyboardInterrupt) if "failure" in change else nullcontext():
        train_any(model, tmp_path, controller, [Fails()])
    for (module, factor), weight in controller.masks.weights.items():
        weight.data = 2 * weight.data if change == "doubled" else getattr(weights[module], factor).clone()
    loaded = {key: weight.detach().clone() for key, weight in controller.masks.weights.items()}
    train_any(model, tmp_path, controller, [beginning])
    assert same(beginning.dense, loaded)
    assert "changed since" in caplog.text


def test_a_checkpoint_holds_every_loss_once_and_a_search_that_differs_is_refused(model, weights, tmp_path):
    first = controller_for(weights)
    train_ours(model, tmp_path, first)
    values, tensors = first.state()
    assert json.dumps(values).count(repr(first.search.history[0].baseline_losses[0])) == 1

    def restored(**changes) -> GraspController:
        controller = controller_for(weights, **changes)
        controller._masks = MaskSet(live_pairs(model, segments_of(weights)), MaskSettings())
        controller.restore(json.loads(json.dumps(values)), tensors)
        return controller

    assert searched(restored()) == searched(first)
    others = [replace(one, completion_ids=(3, 3)) for one in MICRO_DEV]
    for name, changes in {
        "policy.candidates .* and resumes with 4": {"candidates": 4},
        "rule .* and resumes with 'best_reward'": {"rule": "best_reward"},
        "policy.seed .* and resumes with 7": {"seed": 7},
        "rounds.every .* and resumes with 4": {"every": 4},
        "probed rows of hash": {"probes": ProbeSet(others)},
    }.items():
        with pytest.raises(GraspError, match=f"training began with {name}"):
            restored(**changes)
    values["rows"]["rounds.jsonl"][1]["policy_mean"] += 1e-12
    with pytest.raises(GraspError, match="round 2 of the checkpoint led to ratio"):
        restored()


# Adapters and trainers of one's own


@pytest.mark.parametrize("names", [("default", "mine"), ("mine",), ("mine", "other", "default")])
def test_the_active_adapter_is_pruned_whatever_its_name(make_tiny_model, tmp_path, names):
    def others() -> dict:
        return {k: p.clone() for k, p in model.named_parameters() if "lora_" in k and f".{names[-1]}." not in k}

    model = own_adapters(make_tiny_model, *names)
    before, controller = others(), controller_for({}, mask=MaskSettings("input_aware"), folder=tmp_path)
    train_any(model, tmp_path, controller)
    assert same(before, others())
    active = [factor for key, factor in model.named_parameters() if f".{names[-1]}." in key]
    assert {id(factor) for factor in active} == {id(weight) for weight in controller.masks.weights.values()}
    for factor in active:
        assert int((factor == 0).sum()) == prune_count(controller.prune_ratio, factor.numel())
    assert all(reward != 0 for row in read_rows(tmp_path / "rounds.jsonl") for reward in row["rewards"])


EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "architecture": "qwen3_moe"}
BIASED = {"target_modules": ["c_attn"], "architecture": "gpt2", "fan_in_fan_out": True, "lora_bias": True}


@pytest.mark.parametrize("more", [EXPERTS, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_every_lora_weight_is_pruned(make_tiny_model, tmp_path, more):
    model = own_adapters(make_tiny_model, "default", **more)
    controller = controller_for({})
    watch = Watch(controller)
    train_any(model, tmp_path, controller, [watch])
    assert len(watch.ratios) == 12
    lora = [factor for key, factor in model.named_parameters() if "lora_" in key]
    assert len(lora) == len(controller.masks.weights) > 4
    for factor in lora:
        assert int((factor == 0).sum()) == prune_count(controller.prune_ratio, factor.numel())


@pytest.mark.parametrize(
    ("config", "score", "message"),
    [
        (EXPERTS, "input_aware", r"^score 'input_aware' .* model.layers.0.mlp.experts.*'magnitude'"),
        ({"use_dora": True}, "magnitude", r"^\S+\.0\.\S+\.lora_magnitude_vector.* belongs to the adapter.*plain LoRA"),
        (BIASED, "magnitude", r"^\S+\.0\.\S+\.lora_B\S*\.bias.* belongs to the adapter.*plain LoRA"),
    ],
    ids=["experts whose inputs are not seen", "DoRA", "bias"],
)
def test_lora_weights_that_no_mask_covers_are_named(make_tiny_model, tmp_path, config, score, message):
    model = own_adapters(make_tiny_model, "default", **config)
    with pytest.raises(AdapterError, match=message):
        train_any(model, tmp_path, controller_for({}, mask=MaskSettings(score)))


def test_what_is_trained_beside_lora_stays_whole(make_tiny_model, tmp_path):
    model = own_adapters(make_tiny_model, "default", modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    before, controller = head.detach().clone(), controller_for({})
    train_any(model, tmp_path, controller)
    assert (head != before).any()
    assert head.all()
    assert controller.masks.sparsity() > 0


@pytest.mark.parametrize("state", [{"fsdp_plugin": SimpleNamespace(fsdp_version=2)}, {"deepspeed_plugin": "some"}])
def test_sharding_that_hides_the_weights_is_refused(model, weights, tmp_path, monkeypatch, state):
    monkeypatch.setattr(pruned_module, "AcceleratorState", lambda: SimpleNamespace(**state))
    with pytest.raises(GraspError, match=r"(FSDP by accelerate|DeepSpeed).*backbone\.shard"):
        train_any(model, tmp_path, controller_for(weights))


def test_from_rows_builds_the_measured_default(model, weights, tiny_tokenizer, tmp_path):
    rows = [{"prompt": f"What is {i}?", "completion": f" {i}."} for i in range(14)]
    controller = GraspController.from_rows(rows, tiny_tokenizer, segments=segments_of(weights), folder=tmp_path)
    with pytest.raises(ValueError, match="no round was measured yet"):
        _ = controller.learned
    train_any(model, tmp_path, controller)
    assert controller.settings == Controller()
    written = read_rows(tmp_path / "rounds.jsonl")
    assert [row["step"] for row in written] == [0, 12]  # before training and after the epoch of 12 steps
    assert {(len(row["baseline_losses"]), len(row["candidate_losses"][0])) for row in written} == {(14, 7)}
    assert controller.learned == controller.search.best_ratio()
    assert controller.learned.ratio == controller.search.current_ratio
    whole = GraspController.from_rows(rows[:5], tiny_tokenizer, Controller(PaperPolicy(), Rounds(4), "best_reward"))
    assert whole.micro_dev.at(0) is whole.micro_dev.at(1)
    assert GraspController.from_rows(rows, tiny_tokenizer, "paper").settings == PRESETS["paper"]
    slip = {f"base_model.model.{name}": parts for name, parts in segments_of(weights).items()}
    with pytest.raises(AdapterError, match=r"segments names 'base_model\.model\.\S+', which the adapter does not have"):
        train_any(model, tmp_path, GraspController.from_rows(rows, tiny_tokenizer, segments=slip))


# A reward of one's own


def overlap(probe) -> list[float]:
    """The F1 of characters of each answer."""
    assert probe.answers is probe.answers
    pairs = zip(probe.answers, probe.references, strict=True)
    return [2 * (Counter(one) & Counter(other)).total() / (len(one) + len(other)) for one, other in pairs]


def mean_of_losses(probe) -> torch.Tensor:
    return -torch.tensor(probe.losses).mean()


@pytest.mark.parametrize("reward", [overlap, mean_of_losses])
@pytest.mark.parametrize("kind", ["grasp", "paper"])
def test_a_reward_of_ones_own_takes_the_place_of_losses(
    model, weights, tiny_tokenizer, tmp_path, monkeypatch, kind, reward
):
    asked, generate = [], generation.answer
    monkeypatch.setattr(probing, "answer", lambda *call, **more: asked.append(1) or generate(*call, **more))
    seen = []

    def watched(probe):
        seen.append((probe.references, sum(int((factor == 0).sum()) for factor in factors(probe.model))))
        return reward(probe)

    settings = replace(PRESETS[kind], rounds=Rounds(6, kind == "grasp", in_turn=3), rule="surrogate_at_end")
    options = {"segments": segments_of(weights), "folder": tmp_path, "reward": watched}
    controller = GraspController.from_rows(ROWS[:7], tiny_tokenizer, settings, **options)
    train_any(model, tmp_path, controller)
    rounds = read_rows(tmp_path / "rounds.jsonl")
    assert [row["step"] for row in rounds] == ([0, 6, 12] if kind == "grasp" else [6, 12])
    assert len(asked) == (len(seen) if reward is overlap else 0)  # answers are computed when they are asked for, once
    assert {len(references) for references, _ in seen} == {3}
    assert all(one == f"It is {one[6:-1]}." for references, _ in seen for one in references)
    assert len({zeros for _, zeros in seen}) > 3  # each under the mask of its ratio
    for row in rounds:
        losses = [row["baseline_losses"], *row["candidate_losses"]]
        assert {len(one) for one in losses} == ({3} if reward is overlap else {1})
        assert all(0 <= -one <= 1 for one in losses[0]) or reward is mean_of_losses
    learned = controller.learned
    assert 0.1 <= learned.low <= learned.ratio <= learned.high <= 0.8
    assert (learned.low, learned.high) == (0.1, 0.8) or reward is overlap  # one number for all rows leaves it open


def test_rewards_of_losses_are_as_none_equal_ones_commit_nothing_and_answers_leave_no_trace(
    make_tiny_model, tiny_tokenizer, tmp_path
):
    def train(reward) -> tuple[GraspController, AdapterWeights]:
        settings = Controller(GrpoPolicy(), Rounds(6, True, in_turn=3), "surrogate_at_end")
        with adapted(make_tiny_model) as (model, weights):
            options = {"segments": segments_of(weights), "reward": reward}
            controller = GraspController.from_rows(ROWS[:7], tiny_tokenizer, settings, **options)
            train_any(model, tmp_path, controller, tokenizer=tiny_tokenizer)
            return controller, adapter_weights(model)

    (plain, _), (same_losses, _) = train(None), train(lambda probe: [-loss for loss in probe.losses])
    assert searched(plain) == searched(same_losses)
    (equal, one), (_, other) = train(lambda probe: 0.5), train(lambda probe: 0.0 * len(probe.answers))
    assert same_adapters(one, other)
    assert {(row["committed"], *row["advantages"]) for row in equal.rows()[0]} == {(False, 0.0, 0.0, 0.0, 0.0)}
    assert (equal.search.mean, equal.search.std, equal.prune_ratio) == (*GrpoPolicy().start, 0.4)
    with pytest.raises(GraspError, match=r"began with reward None and resumes with '.*lambda>'"):
        same_losses.restore({"decided_by": plain.state()[0]["decided_by"]}, {})


@pytest.mark.parametrize(
    ("given", "shown"),
    [(None, "None"), (math.nan, "nan"), ([1.0, 2.0], "2 values"), ([], "0 values"), ([1.0, "x", 3.0], "'x'")],
)
def test_a_reward_that_is_none_is_named(given, shown):
    def mine(probe):
        return given

    message = rf"^reward mine gave {shown}; it must return a finite number, or one for each of the 3 rows$"
    with pytest.raises(ProbeError, match=message):
        probing.rewarded(mine, SimpleNamespace(examples=[1, 2, 3]))


@pytest.mark.parametrize("kind", [lambda value: value, torch.tensor, np.array])
@pytest.mark.parametrize("given", [2.5, [1.0, 2.0, 3.0]])
def test_rewards_are_numbers_tensors_or_arrays(kind, given):
    losses = probing.rewarded(lambda probe: kind(given), SimpleNamespace(examples=[1, 2, 3]))
    assert losses == (-np.atleast_1d(given)).tolist()


def test_a_reward_needs_rows(model, weights, tmp_path):
    settings = Controller(PaperPolicy(), Rounds(3), "best_reward")
    controller = GraspController(PROBES, settings, segments=segments_of(weights), reward=overlap)
    with pytest.raises(GraspError, match=r"a reward of your own needs the rows; .*from_rows"):
        train_any(model, tmp_path, controller)


@pytest.mark.parametrize("changed", ["EOS token", "chat template"])
def test_rows_are_encoded_with_what_the_trainer_trains_on(model, tiny_tokenizer, tmp_path, changed):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    ways = {"EOS token": {"eos_token": "<unk>"}, "chat template": {"chat_template_path": str(tmp_path / "chat.jinja")}}
    early = GraspController.from_rows(ROWS, tokenizer)
    trainer = make_trainer(model, tmp_path, tokenizer=tokenizer, **ways[changed])
    message = rf"^the trainer's tokenizer has another {changed} than .* with trainer\.processing_class"
    with pytest.raises(DataError, match=message):
        early.add_to(trainer)
    assert early not in trainer.callback_handler.callbacks
    again = GraspController.from_rows(ROWS, trainer.processing_class).add_to(trainer)
    assert again in trainer.callback_handler.callbacks

"""Trainer callbacks that keep a LoRA adapter pruned, and that learn how far to prune it.

`PrunedTraining` holds or reselects a mask at a fixed ratio (the final run). `GraspController` holds the committed mask and every
few optimizer steps runs a round: probe candidate ratios, tell the policy, commit. Both work in any transformers `Trainer`
or TRL `SFTTrainer` whose model is a PEFT LoRA model. They decide nothing: ratios come from the policy, masks from the mask set.
Paper: controller run and final run.
"""

import functools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from grasp_lora.errors import GraspError, ProbeError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.method.masks import (
    FACTORS,
    RANK_DIMENSION,
    MaskSet,
    MaskSettings,
    Ranking,
    WeightKey,
    reset_moments,
)
from grasp_lora.method.policy import PolicySettings, RatioPolicy, Round, make_policy
from grasp_lora.models.adapters import live_pairs
from grasp_lora.storage.checkpoints import State
from grasp_lora.storage.files import write_whole
from grasp_lora.training.probes import ProbeSet, ProbesInTurn, calibrate
from grasp_lora.training.saved import SavedInCheckpoints

log = logging.getLogger(__name__)

MASK_MODES = ("hold", "reselect")
ROUNDS_FILE = "rounds.jsonl"
TIMINGS_FILE = "timings.jsonl"
# What begins the names of the tensors in a checkpoint that hold the order of importance, and the best round's weights and order.
PLACES, BEST, BEST_PLACES = "places.", "best.", "best_places."


@dataclass(frozen=True)
class ControllerSettings:
    """How the controller run learns the ratio.

    Args:
        policy: sampling, update, commit and estimate.
        probe_every: optimizer steps between rounds (K), >= 1.
        patience: rounds in a row without a lower micro-dev loss at any probed ratio, after which training stops: the moment that
            early stopping would keep is over at every ratio. None goes on to the last step.

    Raises:
        ValueError: a setting is outside its range.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    policy: PolicySettings = field(default_factory=PolicySettings)
    probe_every: int = 10
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.probe_every < 1:
            raise ValueError(f"probe_every is {self.probe_every}; it must be at least 1 optimizer step")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}; it must be at least 1 round, or None to train to the end")


class PrunedTraining(SavedInCheckpoints):
    """Train a LoRA adapter pruned at a fixed ratio.

    Args:
        prune_ratio: fraction in [0, 1].
        calibration: examples on which scores that need inputs are measured.
        mask: score, scope and granularity.
        mode: `hold` keeps one mask, `reselect` selects the least important weights anew after every optimizer step.
        segments: module name -> origin of its rank-one components (`segments_of` a merged adapter), for scope `factor`.

    Raises:
        ValueError: the mode is unknown.
    """

    state_name = "pruning"

    def __init__(
        self,
        prune_ratio: float,
        calibration: ProbeSet,
        mask: MaskSettings | None = None,
        mode: str = "hold",
        segments: Mapping[str, tuple[Segment, ...]] | None = None,
    ) -> None:
        if mode not in MASK_MODES:
            raise ValueError(f"mask mode is {mode!r}; allowed: {', '.join(MASK_MODES)}")
        self.prune_ratio = prune_ratio
        self.calibration = calibration
        self.mask = mask or MaskSettings()
        self.mode = mode
        self.segments = segments
        self._masks: MaskSet | None = None

    @property
    def masks(self) -> MaskSet:
        """The live mask set; there is one from the beginning of training on.

        It is that of the last step: count zeros of the weights (`survival`) where `finetune` put an earlier step back.
        """
        if self._masks is None:
            raise RuntimeError("training has not begun, so there are no masks yet")
        return self._masks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune before the first step, or take up the masks of the checkpoint that training resumes from.

        A training that begins anew on the same adapter, such as after `auto_find_batch_size` found a batch too large, begins
        with the stashed values where the mask was on.

        Raises:
            GraspError: the trainer shards weights in a way that hides them.
        """
        _check_weights_are_whole()
        pairs = live_pairs(kwargs["model"], self.segments)
        saved = self.saved_state(args, state)
        # Not on the weights of a checkpoint, which have their own masks.
        if not saved and self._masks is not None and self._masks.holds(pairs):
            self._masks.commit(0.0)
        self._masks = MaskSet(pairs, self.mask)
        if saved:
            self.restore(*saved)
            return
        calibrate(kwargs["model"], self.masks, self.calibration)
        if self.mode == "reselect":
            self.masks.reselect(self.prune_ratio)
        else:
            self.masks.commit(self.prune_ratio)

    def state(self) -> State:
        """Return the ratio and the masks with what they rest on."""
        return {"ratio": self.masks.ratio}, self.masks.state()

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up a state.

        Raises:
            GraspError: it does not fit this adapter or these settings.
        """
        try:
            self.masks.restore(tensors, values["ratio"])
        except ValueError as error:
            raise GraspError(str(error)) from error

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the gradients of held weights."""
        if self.mode == "hold":
            self.masks.mask_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the mask back on."""
        if self.mode == "hold":
            self.masks.enforce()
        else:
            self.masks.reselect(self.prune_ratio)


@dataclass(frozen=True)
class _BestRound:
    """What a controller keeps of the round with the lowest baseline loss.

    Args:
        loss: mean baseline loss.
        dense: every weight, masked ones with their stashed values; whole, also of sharded weights.
        ranking: the order of importance that the round's masks were made from.
    """

    loss: float
    dense: Mapping[WeightKey, torch.Tensor]
    ranking: Mapping[WeightKey, Ranking]


class GraspController(PrunedTraining):
    """Learn one global prune ratio while an adapter trains.

    Args:
        micro_dev: the examples on which candidates are probed, 16 in the paper; or a pool of which rounds take a few in turn.
        settings: policy and spacing of rounds.
        mask: score, scope and granularity.
        segments: module name -> origin of its rank-one components, for scope `factor`.
        folder: where `rounds.jsonl` and `timings.jsonl` go; None writes no files.
        on_round: called with each round's record, for a progress display.
        keep_best: keep a copy of the dense weights at the round with the lowest baseline loss, for `best_adapter`. It costs the
            memory of a second adapter and of its order of importance.

    After training, `policy.best_ratio()` is the learned ratio. Raises ProbeError during training when a probe's loss is not
    finite. Where the trainer saves checkpoints, everything is in them, and a resumed training goes on with the same rounds; one
    that patience had stopped takes a step, without a round, and stops again.
    """

    state_name = "controller"

    def __init__(
        self,
        micro_dev: ProbeSet | ProbesInTurn,
        settings: ControllerSettings | None = None,
        mask: MaskSettings | None = None,
        segments: Mapping[str, tuple[Segment, ...]] | None = None,
        folder: Path | None = None,
        on_round: Callable[[dict[str, Any]], None] | None = None,
        keep_best: bool = False,
    ) -> None:
        self.settings = settings or ControllerSettings()
        self.policy: RatioPolicy = make_policy(self.settings.policy)
        super().__init__(self.policy.current_ratio, micro_dev.at(0), mask, "hold", segments)
        rules = self.settings.policy
        if isinstance(micro_dev, ProbesInTurn) and rules.whole_rounds:
            raise ValueError(
                f"the estimate {rules.estimate!r} needs all examples in each round, not some in turn; take 'surrogate' or "
                "'smooth_fit', or a ProbeSet"
            )
        self.micro_dev = micro_dev
        self._compares_rounds = rules.compares_rounds(self.settings.patience, keep_best)
        self.folder = folder
        self.keep_best = keep_best
        self._best: _BestRound | None = None
        self._on_round = on_round
        self._log: Callable[[dict[str, float]], None] | None = None
        self._rows: dict[str, list[dict[str, Any]]] = {ROUNDS_FILE: [], TIMINGS_FILE: []}
        self._round_end = 0.0
        self._shared: dict[WeightKey, Ranking] | None = None  # order of importance before training, if all ratios train

    def add_to(self, trainer: Trainer) -> "GraspController":
        """Register with a trainer, so that its trackers receive the ratio, the deviation and the rewards too."""
        trainer.add_callback(self)
        # Not trainer.log: TRL's adds its own running metrics to every row and starts them anew.
        self._log = functools.partial(Trainer.log, trainer)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune at the policy's first ratio and start the records; a resume cuts off rounds after its checkpoint."""
        self._rows = {ROUNDS_FILE: [], TIMINGS_FILE: []}
        if self._masks is not None:  # a training of this controller's has begun before
            self.policy = make_policy(self.settings.policy)
            self.prune_ratio = self.policy.current_ratio
            self._shared, self._best = None, None
        super().on_train_begin(args, state, control, **kwargs)
        if self.policy.shared and self._shared is None:
            self._shared = self.masks.rank()
        if self.folder is not None and state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, rows in self._rows.items():
                write_whole(self.folder / name, "".join(map(_line, rows)))
        self._round_end = time.perf_counter()

    def best_adapter(self, prune_ratio: float) -> AdapterWeights:
        """Return the adapter of the round with the lowest baseline loss, pruned as that round's masks are; float32, on the CPU.

        The last step is of no use to go on from: with few examples the run overfits long before its end, which the baselines
        show. Nothing of the live adapter changes.

        Args:
            prune_ratio: fraction in [0, 1].

        Raises:
            RuntimeError: no round was kept, since `keep_best` is off or none was run.
        """
        if self._best is None:
            raise RuntimeError("no round was kept; give keep_best=True and train for at least one round")
        pairs = {}
        for module, pair in self.masks.pairs.items():
            pruned = []
            for factor in FACTORS:
                dense = self._best.dense[module, factor]
                keep = self._best.ranking[module, factor].keep(prune_ratio, RANK_DIMENSION[factor])
                pruned.append(torch.where(keep, dense, torch.zeros_like(dense)).float().cpu())
            pairs[module] = LoraPair(pruned[0], pruned[1], pair.scaling, pair.segments)
        return AdapterWeights(pairs)

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the rounds and their timings, as `rounds.jsonl` and `timings.jsonl` hold them."""
        return self._rows[ROUNDS_FILE], self._rows[TIMINGS_FILE]

    def state(self) -> State:
        """Return masks, policy, records and the best round."""
        values, tensors = super().state()
        values |= {"policy": self.policy.state(), "rows": self._rows}
        if self._shared is not None:
            tensors |= _named(PLACES, _places(self._shared))
        if self.keep_best:
            values["best_loss"] = None if self._best is None else self._best.loss
        if self._best is not None:
            tensors |= _named(BEST, self._best.dense)
            if self._shared is None:  # else it is that of all rounds
                tensors |= _named(BEST_PLACES, _places(self._best.ranking))
        return values, tensors

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up a state of the same policy settings.

        Raises:
            GraspError: the state does not fit.
        """
        if values["policy"]["settings"] != asdict(self.settings.policy):
            raise GraspError(
                "training resumes with other settings of the policy than it began with; give it the same, or start anew"
            )
        if self.keep_best and "best_loss" not in values:
            raise GraspError(
                "training resumes from a checkpoint that kept no best round; leave keep_best out as it was, or start anew"
            )
        own = (PLACES, BEST, BEST_PLACES)
        super().restore(values, {name: tensor for name, tensor in tensors.items() if not name.startswith(own)})
        self.policy = RatioPolicy.from_state(values["policy"])
        if self.policy.shared:
            self._shared = self._ranking(tensors, PLACES)
        if self.keep_best and values["best_loss"] is not None:
            dense = {
                key: tensor.to(self.masks.weights[key].device) for key, tensor in _of_prefix(BEST, tensors).items()
            }
            ranking = self._shared if self._shared is not None else self._ranking(tensors, BEST_PLACES)
            self._best = _BestRound(values["best_loss"], dense, ranking)
        self.prune_ratio = self.policy.current_ratio
        self._rows = values["rows"]

    def _ranking(self, tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[WeightKey, Ranking]:
        """The order of importance in a checkpoint; its groups are those of the masks."""
        places = _of_prefix(prefix, tensors)
        return {key: replace(one, places=places[key].to(one.places.device)) for key, one in self.masks.rank().items()}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where all ratios train together, put the mask of this step's own ratio on; before the first step comes a round."""
        if self._shared is None:
            return
        if not self.policy.history and self._round_follows(state):
            self._round(state, control, kwargs["model"], None)
        self.masks.commit(self.policy.training_ratio(state.global_step), self._shared)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Run a round when it is due; stop when patience has run out."""
        if not self._settled and self._round_follows(state):
            self._round(state, control, kwargs["model"], kwargs.get("optimizer"))
        if self._settled:
            control.should_training_stop = True
        if control.should_evaluate or control.should_save:
            self._leave_at_the_policys_ratio()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the adapter as it should be evaluated and saved, and as it stays where training ends here."""
        self._leave_at_the_policys_ratio()

    def _leave_at_the_policys_ratio(self) -> None:
        """Where all ratios train together, the adapter is pruned at the step's own."""
        if self._shared is not None:
            self.masks.commit(self.policy.current_ratio, self._shared)

    @property
    def _settled(self) -> bool:
        """Whether patience has run out, now or before the checkpoint that training resumed from."""
        return self.settings.patience is not None and self.policy.rounds_since_best >= self.settings.patience

    def _round_follows(self, state: TrainerState) -> bool:
        return self.policy.settings.round_follows(state.global_step, state.max_steps, self.settings.probe_every)

    def _round(
        self,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """Run a round and put it on record."""
        started = time.perf_counter()
        record = self.run_round(model, optimizer)
        record = {"round": len(self.policy.history), "step": state.global_step, "epoch": state.epoch, **record}
        ended = time.perf_counter()
        timing = {
            "round": record["round"],
            "step": state.global_step,
            "probe_seconds": ended - started,
            "train_seconds": started - self._round_end,
        }
        if self._log is not None:
            # Any log call ends the trainer's wish to log this step's loss, which all ranks gather together: put it back.
            should_log = control.should_log
            self._log(_tracked(record))
            control.should_log = should_log
        self._record(ROUNDS_FILE, record, state)
        self._record(TIMINGS_FILE, timing, state)
        if self._on_round is not None and state.is_world_process_zero:
            self._on_round(record)
        self._round_end = time.perf_counter()

    def run_round(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        """Probe the candidates, tell the policy, commit what it decides; return the record of the round.

        Raises:
            ProbeError: a loss is not a finite number.
        """
        masks, policy = self.masks, self.policy
        number = len(policy.history)
        probes = at_baseline = self.micro_dev.at(number)
        places = None
        if isinstance(self.micro_dev, ProbesInTurn) and self._compares_rounds:
            at_baseline, places = self.micro_dev.whole, self.micro_dev.places(number)
        ratio_before = policy.current_ratio
        if self._shared is not None:
            masks.commit(ratio_before, self._shared)  # in place of the mask of the last step's ratio
            baseline, ranking = at_baseline.losses(model), self._shared
        else:
            baseline = calibrate(model, masks, at_baseline) or at_baseline.losses(model)
            ranking = masks.rank()
        if self.keep_best:
            self._keep_if_best(math.fsum(baseline) / len(baseline), ranking)
        candidates = policy.ask()
        # Candidates coincide where bounds clamp them. The mask in force may be of an older order of importance than theirs.
        known = baseline if places is None else [baseline[place] for place in places]
        measured = {ratio_before: known} if self._shared is not None else {}
        for candidate in candidates:
            if candidate in measured:
                continue
            try:
                with masks.probe(candidate, ranking):
                    measured[candidate] = probes.losses(model)
            except ProbeError as error:
                raise ProbeError(f"probe of prune ratio {candidate:.4f}: {error}") from error
        candidate_losses = [measured[candidate] for candidate in candidates]
        decision = policy.tell(
            Round(
                ratio_before,
                tuple(candidates),
                tuple(baseline),
                tuple(tuple(losses) for losses in candidate_losses),
                places,
            )
        )
        if decision.committed:
            newly_masked = masks.commit(decision.ratio, ranking)
            self.prune_ratio = decision.ratio
            if optimizer is not None and self._shared is None:  # a weight that comes and goes keeps its moments
                reset_moments(optimizer, masks.weights, newly_masked)
        return {
            "candidates": candidates,
            "baseline_losses": baseline,
            "candidate_losses": candidate_losses,
            "places": None if places is None else list(places),
            "rewards": list(decision.rewards),
            "policy_mean": policy.mean,
            "policy_std": policy.std,
            "committed": decision.committed,
            "clipped": decision.clipped,
            "ratio_before": ratio_before,
            "ratio": decision.ratio,
            "measured_sparsity": masks.sparsity(),
        }

    @torch.no_grad()
    def _keep_if_best(self, loss: float, ranking: Mapping[WeightKey, Ranking]) -> None:
        if self._best is not None and loss >= self._best.loss:
            return
        masks = self.masks
        dense = {key: torch.where(masks.keep[key], weight, masks.stash[key]) for key, weight in masks.weights.items()}
        # Gathered where they are sharded, as an order of importance is.
        whole = {key: one.full_tensor() if hasattr(one, "full_tensor") else one for key, one in dense.items()}
        self._best = _BestRound(loss, whole, ranking)

    def _record(self, name: str, row: dict[str, Any], state: TrainerState) -> None:
        self._rows[name].append(row)
        if self.folder is not None and state.is_world_process_zero:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(_line(row))


def _check_weights_are_whole() -> None:
    """Refuse what flattens or partitions the weights that masks are laid on, or steps the optimizer by itself."""
    state = AcceleratorState()
    if getattr(state, "deepspeed_plugin", None) is not None:
        raise GraspError(
            "the trainer uses DeepSpeed, under which masks cannot be held; train with DDP (plain torchrun)"
        )
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise GraspError(
            "the trainer uses FSDP1, which flattens the weights that are masked; train with DDP (plain torchrun)"
        )


def _places(ranking: Mapping[WeightKey, Ranking]) -> dict[WeightKey, torch.Tensor]:
    return {key: one.places for key, one in ranking.items()}


def _named(prefix: str, tensors: Mapping[WeightKey, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the factors by the names that they have in a checkpoint."""
    return {f"{prefix}{factor}.{module}": tensor for (module, factor), tensor in tensors.items()}


def _of_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[WeightKey, torch.Tensor]:
    """What `_named` named, among other tensors."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            factor, module = name.removeprefix(prefix).split(".", 1)
            found[module, factor] = tensor
    return found


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _tracked(record: Mapping[str, Any]) -> dict[str, float]:
    """The round's scalars, as trackers take them."""
    baseline = record["baseline_losses"]
    return {
        "grasp/prune_ratio": record["ratio"],
        "grasp/policy_mean": record["policy_mean"],
        "grasp/policy_std": record["policy_std"],
        "grasp/best_reward": max(record["rewards"]),
        "grasp/micro_dev_loss": math.fsum(baseline) / len(baseline),
        "grasp/measured_sparsity": record["measured_sparsity"],
    }

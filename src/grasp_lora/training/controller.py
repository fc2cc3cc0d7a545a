"""A Trainer callback that learns how far to prune a LoRA adapter while it trains.

Every few optimizer steps `GraspController` runs a round (`run_round`, one screen below):

    baseline    the loss of each probed example under the mask of the current ratio, say 0.40
    ask         the search gives candidate ratios, say 0.31 and 0.66
    probe       the loss of the same examples under the mask of each; afterwards every weight is what it was
    tell        the search takes all losses, and says whether the current ratio moves
    commit      the current ratio moves and its mask comes on, until the next step where each has one of its own; what it takes is
                stashed for a lower ratio

Two regimes say under which mask the steps between rounds train. `each_step` (preset `grasp`, the default): each step under a
ratio of its own, so that no ratio is favoured by what the network has healed around; the weights are ranked once, before
training, so that all masks nest. `held` (preset `paper`): that of the current ratio; each round ranks the weights anew.

It works in any transformers `Trainer` or TRL `SFTTrainer` whose model is a PEFT LoRA model. It decides nothing: ratios come from
the search (`method.search`), masks from the mask set (`method.masks`).
Paper: controller run.
"""

import functools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from grasp_lora.data.encode import check_encoding, encode_rows, encoding_of
from grasp_lora.errors import GraspError
from grasp_lora.method.lora import Segment
from grasp_lora.method.masks import MaskSettings, Order, named, reset_moments
from grasp_lora.method.rules import RatioEstimate, Round
from grasp_lora.method.search import Controller, RatioSearch, plain_policy, preset, ratio_rule
from grasp_lora.storage.checkpoints import State
from grasp_lora.storage.writing import write_jsonl
from grasp_lora.training.probes import (
    Probe,
    ProbeSet,
    ProbesInTurn,
    Reward,
    calibrate,
    probes_of,
    rewarded,
)
from grasp_lora.training.pruned import PrunedTraining

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ROUNDS_FILE = "rounds.jsonl"
TIMINGS_FILE = "timings.jsonl"
PLACES = "places."  # begins the names of the tensors in a checkpoint that hold the order of importance


class GraspController(PrunedTraining):
    """Learn one global prune ratio while an adapter trains.

    Args:
        micro_dev: the examples on which candidates are probed, of whatever pool (by default the dev set; 16 in the paper): all of
            them, whatever `rounds.in_turn` says; or a pool of which rounds take a few in turn (`ProbesInTurn`; `from_rows` makes
            one where the rounds ask for it).
        settings: policy, rounds and rule, or the name of a preset.
        mask: the score.
        segments: module name -> origin of its rank-one components, as `segments_of` gives it.
        folder: where `rounds.jsonl` and `timings.jsonl` go; None writes no files.
        on_round: called with each round's record, for a progress display.
        reward: of each probe, in place of the fall of its loss: a function of a `Probe`, higher is better. One number a row
            keeps the interval of the ratio; one for all rows leaves it open. Only with `from_rows`, which knows the rows.

    After training, `learned` is the learned ratio. Raises ProbeError during training when a probe's loss is not
    finite. Where the trainer saves checkpoints, everything is in them, and a resumed training goes on with the same rounds; one
    that patience had stopped takes a step, without a round, and stops again.
    """

    state_name = "controller"

    def __init__(
        self,
        micro_dev: ProbeSet | ProbesInTurn,
        settings: Controller | str = "grasp",
        mask: MaskSettings | None = None,
        segments: Mapping[str, tuple[Segment, ...]] | None = None,
        folder: Path | None = None,
        on_round: Callable[[dict[str, Any]], None] | None = None,
        reward: Reward | None = None,
    ) -> None:
        self.settings = preset(settings)
        self.micro_dev = micro_dev
        self.folder = None if folder is None else Path(folder)
        self._log: Callable[[dict[str, float]], None] | None = None
        self._encoding: tuple[object, object] | None = None  # of the rows; a tokenizer may be changed in place
        self._on_round = on_round
        self._reward = reward
        self._rows_of: dict[str, Any] = {}  # what a reward needs of the rows that `from_rows` was given
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._round_end = 0.0
        self._spacing = 1
        self._start_anew()
        # "hold" is the mode of masks, not the regime: the mask of the moment stays on through a step in both regimes.
        super().__init__(self.search.current_ratio, micro_dev.at(0), mask, "hold", segments)

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: "PreTrainedTokenizerBase",
        settings: Controller | str = "grasp",
        **options: Any,
    ) -> "GraspController":
        """Build the controller of a trainer of your own.

        Args:
            rows: examples to probe, in TRL's prompt/completion convention: the dev set.
            tokenizer: of the trainer, as it trains.
            settings: policy, rounds and rule, or the name of a preset.
            options: what else the constructor takes.
        """
        settings = preset(settings)
        examples = encode_rows(rows, tokenizer)
        turn = settings.rounds.turn(len(examples))
        controller = cls(probes_of(examples, turn, settings.policy.seed), settings, **options)
        controller._encoding = encoding_of(tokenizer)
        controller._rows_of, controller._tokenizer = {example.id: example for example in examples}, tokenizer
        return controller

    @property
    def learned(self) -> RatioEstimate:
        """The learned ratio, by the rounds so far.

        Raises:
            ValueError: there was no round.
        """
        return self.search.best_ratio()

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the rounds and their timings, as `rounds.jsonl` and `timings.jsonl` hold them."""
        return self._rows[ROUNDS_FILE], self._rows[TIMINGS_FILE]

    def add_to(self, trainer: Trainer) -> Self:
        """Register with a trainer; its trackers receive the ratio, the deviation and the rewards, too.

        Raises:
            DataError: its tokenizer has another EOS token or chat template than that of `from_rows` had.
        """
        check_encoding(self._encoding, trainer.processing_class)
        # Not trainer.log: TRL's adds its own running metrics to every row and starts them anew.
        self._log = functools.partial(Trainer.log, trainer)
        return super().add_to(trainer)

    def _start_anew(self) -> None:
        self.search = RatioSearch(self.settings.policy, ratio_rule(self.settings.rule))
        self._each_step = self.settings.policy.regime == "each_step"
        self._order: Order | None = None  # that of the whole run, where each step has a mask of its own
        self.prune_ratio = self.search.current_ratio
        self._rows: dict[str, list[dict[str, Any]]] = {ROUNDS_FILE: [], TIMINGS_FILE: []}

    # One round

    def run_round(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        """Probe the candidates, tell the search, commit what it decides.

        Raises:
            ProbeError: a loss is not a finite number.
        """
        masks, search, number = self.masks, self.search, len(self.search.history)
        # Candidates are compared on the few examples whose turn it is; where rounds are compared, too, the baseline needs all.
        few, places = self.micro_dev.at(number), self.micro_dev.places(number)
        whole = self.micro_dev.whole if self.settings.compares_rounds else few

        self._rest()
        if not self._each_step:
            calibrate(model, masks, whole)
        order = self._order if self._each_step else masks.rank()
        baseline = self._measure(model, whole)
        if places is not None and len(baseline) < len(places):  # a reward of one number, that of the candidates' rows
            baseline, places = baseline if whole is few else self._measure(model, few), None
        candidates, before = search.ask(), search.current_ratio
        of_turn = baseline if whole is few or places is None else [baseline[place] for place in places]
        # Equal ratios have equal masks where all are of one order; else the mask that is on may be of an older one.
        losses = {before: of_turn} if self._each_step else {}
        for ratio in candidates:
            if ratio not in losses:  # candidates coincide where bounds clamp them
                with masks.probe(ratio, order):
                    losses[ratio] = self._measure(model, few)
        by_candidate = [losses[ratio] for ratio in candidates]
        measured = Round(before, tuple(candidates), tuple(baseline), tuple(map(tuple, by_candidate)), places)
        decision = search.tell(measured)
        if decision.committed:
            masks.commit(decision.ratio, order)
            if optimizer is not None and not self._each_step:  # there a weight that comes and goes keeps its moments
                reset_moments(optimizer, masks.weights, masks.newly_masked)
            # The base class's name for the current ratio; `masks.ratio` is what is on now.
            self.prune_ratio = decision.ratio
        advantages = search.policy.advantages(measured)
        record = decision.to_json(measured, advantages, search.mean, search.std, masks.sparsity())
        # Every fourth ratio of the grid is enough to see the curve grow.
        curve = search.best_ratio(interval=False).curve[::4]
        return record | {"curve": [[ratio, loss] for ratio, loss, *_ in curve]}

    def _measure(self, model: torch.nn.Module, probes: ProbeSet) -> list[float]:
        """The loss of each example, or what stands in its place: the negative of a reward of one's own."""
        if self._reward is None:
            return probes.losses(model)
        if self._tokenizer is None:
            raise GraspError("a reward of your own needs the rows; build the controller by GraspController.from_rows")
        examples = [self._rows_of[name] for name in probes.ids]
        return rewarded(self._reward, Probe(model, examples, probes, self._tokenizer))

    # In a training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune at the first ratio and start the records; a resume cuts off rounds after its checkpoint."""
        every = self.settings.rounds.every
        self._spacing = _steps_per_epoch(args, kwargs["train_dataloader"]) if every == "epoch" else every
        if state.max_steps and not self.settings.rounds.round_steps(state.max_steps, self._spacing):
            raise GraspError(
                f"no round falls into {state.max_steps} steps; lower rounds.every ({every!r}), or train longer"
            )
        if self._masks is not None:  # a training of this controller's has begun before
            self._start_anew()
        super().on_train_begin(args, state, control, **kwargs)
        if self._each_step and not state.global_step:
            self._order = self.masks.rank()
        self._write_records(state)  # without the rounds that a resume has cut off
        self._round_end = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put on the mask of the step; a round before training comes first."""
        if state.global_step == 0 and not self.search.history and self._round_follows(state):
            self._round(state, control, kwargs["model"], None)
        if self._each_step:
            self.masks.commit(self.search.training_ratio(state.global_step), self._order)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Run a round when it is due; stop when patience has run out."""
        if not self._settled and self._round_follows(state):
            self._round(state, control, kwargs["model"], kwargs.get("optimizer"))
        if self._settled:
            control.should_training_stop = True
        # Asked for by the Trainer; `Saving` of `finetune` comes later and saves under the mask of the step, which resumes alike.
        if control.should_evaluate or control.should_save:
            self._rest()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the adapter as it should be evaluated and saved, and as it stays where training ends here."""
        self._rest()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where the trainer has put the best checkpoint back, go back to its rounds, too."""
        measured = len(self.search.history)
        super().on_train_end(args, state, control, **kwargs)
        if later := measured - len(self.search.history):
            logger.warning(
                "the weights are those of %s; %d later rounds do not count", state.best_model_checkpoint, later
            )
            self._write_records(state)

    def _rest(self) -> None:
        """Put on the mask of the current ratio: before a round, an evaluation or a checkpoint, and at the end."""
        if self._each_step:  # else it is on
            self.masks.commit(self.search.current_ratio, self._order)

    @property
    def _settled(self) -> bool:
        """Whether patience has run out, now or before the checkpoint that training resumed from."""
        patience = self.settings.rounds.patience
        return patience is not None and self.search.rounds_since_best >= patience

    def _round_follows(self, state: TrainerState) -> bool:
        return self.settings.rounds.round_follows(state.global_step, state.max_steps, self._spacing)

    def _round(
        self,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """Run a round and put it on record."""
        started = time.perf_counter()
        measured = self.run_round(model, optimizer)
        place = {"round": len(self.search.history), "step": state.global_step}
        record: dict[str, Any] = {**place, "epoch": state.epoch, **measured}
        ended = time.perf_counter()
        timing = {**place, "probe_seconds": ended - started, "train_seconds": started - self._round_end}
        if self._log is not None:
            # Any log call ends the trainer's wish to log this step's loss, which all ranks gather together: put it back.
            should_log = control.should_log
            self._log(scalars_of(measured))
            control.should_log = should_log
        self._record(ROUNDS_FILE, record, state)
        self._record(TIMINGS_FILE, timing, state)
        if self._on_round is not None and state.is_world_process_zero:
            self._on_round(record)
        self._round_end = time.perf_counter()

    def _write_records(self, state: TrainerState) -> None:
        if self.folder is not None and state.is_world_process_zero:
            for name, rows in self._rows.items():
                write_jsonl(self.folder / name, rows)

    def _record(self, name: str, row: dict[str, Any], state: TrainerState) -> None:
        self._rows[name].append(row)
        if self.folder is not None and state.is_world_process_zero:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    # Checkpoints

    def state(self) -> State:
        """Return masks, settings and rounds; the search follows from the rounds."""
        values, tensors = super().state()
        if self._order is not None:
            tensors |= named(PLACES, self._order)
        return values | {"rows": self._rows}, tensors

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up a state of the same settings: the search is told its rounds again.

        Raises:
            GraspError: the state does not fit.
        """
        super().restore(values, tensors)
        self._start_anew()
        self._rows = values["rows"]
        for row in self._rows[ROUNDS_FILE]:
            decision = self.search.tell(Round.from_json(row))
            if (self.search.mean, self.search.std, decision.ratio) != (
                row["policy_mean"],
                row["policy_std"],
                row["ratio"],
            ):
                raise GraspError(
                    f"round {row['round']} of the checkpoint led to ratio {row['ratio']}, but told again it leads to "
                    f"{decision.ratio}; resume with the versions and on the kind of machine it began with, or start anew"
                )
        self._order = self.masks.on_device(PLACES, tensors) or None
        self.prune_ratio = self.search.current_ratio

    @property
    def _most_pruned(self) -> float:
        return self.settings.policy.ratio_max

    def _decided_by(self) -> dict[str, Any]:
        """What decides masks and search: not the ratio, which is learned, but the probed rows, whose losses are compared."""
        policy = {f"policy.{name}": value for name, value in plain_policy(self.settings.policy).items()}
        rounds = {f"rounds.{name}": value for name, value in asdict(self.settings.rounds).items()}
        probed = f"{self.micro_dev.whole.fingerprint()}, {len(self.micro_dev.at(0))} in a round"
        reward = (
            None if self._reward is None else getattr(self._reward, "__qualname__", type(self._reward).__qualname__)
        )
        more = {"rule": ratio_rule(self.settings.rule).name, "probed rows of hash": probed, "reward": reward}
        return (
            {name: value for name, value in super()._decided_by().items() if name != "prune_ratio"}
            | policy
            | rounds
            | more
        )


def scalars_of(measured: Mapping[str, Any]) -> dict[str, float]:
    """Return a round's scalars, as trackers take them."""
    return {
        "grasp/prune_ratio": measured["ratio"],
        "grasp/policy_mean": measured["policy_mean"],
        "grasp/policy_std": measured["policy_std"],
        "grasp/best_reward": max(measured["rewards"]),
        "grasp/micro_dev_loss": fmean(measured["baseline_losses"]),
        "grasp/measured_sparsity": measured["measured_sparsity"],
        **{
            f"grasp/{name}_{number}": value
            for name in ("candidate", "reward", "advantage")
            for number, value in enumerate(measured[f"{name}s"], 1)
        },
    }


def _steps_per_epoch(args: TrainingArguments, batches: Any) -> int:
    """Optimizer steps in an epoch; data that are streamed have one, as long as the training, as the Trainer counts it."""
    return math.ceil(len(batches) / args.gradient_accumulation_steps) if has_length(batches) else args.max_steps

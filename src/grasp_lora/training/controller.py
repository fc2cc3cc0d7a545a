"""A Trainer callback that learns how far to prune a LoRA adapter while it trains.

Every few optimizer steps `GraspController` runs a round: probe candidate ratios, tell the search, commit. It works in any
transformers `Trainer` or TRL `SFTTrainer` whose model is a PEFT LoRA model. It decides nothing: ratios come from the search,
masks from the mask set, and which mask is on when from the regime.
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
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from grasp_lora.data.encode import check_encoding, encoding_of
from grasp_lora.errors import GraspError, ProbeError
from grasp_lora.method.lora import Segment
from grasp_lora.method.masks import MaskSettings, Ranking, named, of_prefix
from grasp_lora.method.policy import plain_policy
from grasp_lora.method.presets import Controller, controller_settings, ratio_rule
from grasp_lora.method.rounds import RatioEstimate, Round, RoundRecord
from grasp_lora.method.search import RatioSearch
from grasp_lora.storage.checkpoints import State
from grasp_lora.storage.files import write_jsonl
from grasp_lora.training.probes import ProbeSet, ProbesInTurn, checked_probes, encoded_rows, probes_of
from grasp_lora.training.pruned import PrunedTraining
from grasp_lora.training.regimes import regime_of
from grasp_lora.training.trackers import scalars_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ROUNDS_FILE = "rounds.jsonl"
TIMINGS_FILE = "timings.jsonl"
PLACES = "places."  # begins the names of the tensors in a checkpoint that hold the order of importance


class GraspController(PrunedTraining):
    """Learn one global prune ratio while an adapter trains.

    Args:
        micro_dev: the examples on which candidates are probed, 16 in the paper, all of them whatever `rounds.in_turn` says; or a
            pool of which rounds take a few in turn (`ProbesInTurn`; `from_rows` makes one where the rounds ask for it).
        settings: policy, rounds and rule; None takes preset `spread`.
        mask: the score.
        segments: module name -> origin of its rank-one components, each pruned by itself.
        folder: where `rounds.jsonl` and `timings.jsonl` go; None writes no files.
        on_round: called with each round's record, for a progress display.

    After training, `learned` is the learned ratio. Raises ProbeError during training when a probe's loss is not
    finite. Where the trainer saves checkpoints, everything is in them, and a resumed training goes on with the same rounds; one
    that patience had stopped takes a step, without a round, and stops again.
    """

    state_name = "controller"

    def __init__(
        self,
        micro_dev: ProbeSet | ProbesInTurn,
        settings: Controller | str | None = None,
        mask: MaskSettings | None = None,
        segments: Mapping[str, tuple[Segment, ...]] | None = None,
        folder: Path | None = None,
        on_round: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.settings = controller_settings(settings)
        self.micro_dev = checked_probes(micro_dev)
        self.folder = None if folder is None else Path(folder)
        self._log: Callable[[dict[str, float]], None] | None = None
        self._encoding: tuple[object, object] | None = None  # of the rows; a tokenizer may be changed in place
        self._on_round = on_round
        self._round_end = 0.0
        self._spacing = 1
        self._start_anew()
        super().__init__(self.search.current_ratio, micro_dev.at(0), mask, "hold", segments)

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: "PreTrainedTokenizerBase",
        settings: Controller | str | None = None,
        **options: Any,
    ) -> "GraspController":
        """Build the controller of a trainer of your own.

        Args:
            rows: examples to probe, in TRL's prompt/completion convention: the dev set.
            tokenizer: of the trainer, as it trains.
            settings: policy, rounds and rule, or the name of a preset; None takes preset `spread`.
            options: what else the constructor takes.
        """
        settings = controller_settings(settings)
        examples, pad_id = encoded_rows(rows, tokenizer)
        turn = settings.rounds.turn(len(examples))
        controller = cls(probes_of(examples, pad_id, turn, settings.policy.seed), settings, **options)
        controller._encoding = encoding_of(tokenizer)
        return controller

    @property
    def learned(self) -> RatioEstimate:
        """The learned ratio, by the rounds so far.

        Raises:
            ValueError: there was no round.
        """
        return self.search.best_ratio()

    def add_to(self, trainer: Trainer) -> "GraspController":
        """Register with a trainer, so that its trackers receive the ratio, the deviation and the rewards too.

        Raises:
            DataError: its tokenizer has another EOS token or chat template than that of `from_rows` had.
        """
        check_encoding(self._encoding, trainer.processing_class)
        trainer.add_callback(self)
        # Not trainer.log: TRL's adds its own running metrics to every row and starts them anew.
        self._log = functools.partial(Trainer.log, trainer)
        return self

    @property
    def _most_pruned(self) -> float:
        return self.settings.policy.ratio_max

    def _start_anew(self) -> None:
        self.search = RatioSearch(self.settings.policy, ratio_rule(self.settings.rule))
        self.regime = regime_of(self.settings.policy)
        self.prune_ratio = self.search.current_ratio
        self._rows: dict[str, list[dict[str, Any]]] = {ROUNDS_FILE: [], TIMINGS_FILE: []}

    # One round

    def run_round(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> RoundRecord:
        """Probe the candidates, tell the search, commit what it decides.

        Raises:
            ProbeError: a loss is not a finite number.
        """
        masks, search, number = self.masks, self.search, len(self.search.history)
        few = self.micro_dev.at(number)
        compared = self.settings.compares_rounds
        whole, places = (self.micro_dev.whole, self.micro_dev.places(number)) if compared else (few, None)

        self.regime.rest(masks, search)
        baseline, order = self.regime.measure_baseline(model, masks, whole)
        candidates, before = search.ask(), search.current_ratio
        known = baseline if places is None else [baseline[place] for place in places]
        losses = {ratio: known for ratio in candidates if self.regime.is_baseline(ratio, before)}
        for ratio in candidates:
            if ratio not in losses:  # candidates coincide where bounds clamp them
                losses[ratio] = self._probe(model, ratio, order, few)
        by_candidate = [losses[ratio] for ratio in candidates]
        measured = Round(before, tuple(candidates), tuple(baseline), tuple(map(tuple, by_candidate)), places)
        decision = search.tell(measured)
        if decision.committed:
            self.regime.commit(masks, decision.ratio, order, optimizer)
            self.prune_ratio = decision.ratio
        return decision.to_json(measured, search.mean, search.std, masks.sparsity())

    def _probe(self, model: torch.nn.Module, ratio: float, order: Ranking, examples: ProbeSet) -> list[float]:
        try:
            with self.masks.probe(ratio, order):
                return examples.losses(model)
        except ProbeError as error:
            raise ProbeError(f"probe of prune ratio {ratio:.4f}: {error}") from error

    # In a training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune at the first ratio and start the records; a resume cuts off rounds after its checkpoint."""
        every = self.settings.rounds.every
        self._spacing = _steps_per_epoch(args, kwargs["train_dataloader"]) if every == "epoch" else every
        if not (planned := self.settings.rounds.round_steps(state.max_steps, self._spacing)) and state.max_steps:
            raise GraspError(
                f"no round falls into {state.max_steps} steps; lower rounds.every ({every!r}), or train longer"
            )
        if planned == [0]:
            logger.warning("the only round of this training comes before its first step, and shows nothing of training")
        if self._masks is not None:  # a training of this controller's has begun before
            self._start_anew()
        super().on_train_begin(args, state, control, **kwargs)
        if self.regime.order is None:
            self.regime.begin(self.masks)
        self._write_records(state)
        self._round_end = time.perf_counter()

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

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put on the mask of the step; a round before training comes first."""
        if state.global_step == 0 and not self.search.history and self._round_follows(state):
            self._round(state, control, kwargs["model"], None)
        self.regime.before_step(self.masks, self.search, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Run a round when it is due; stop when patience has run out."""
        if not self._settled and self._round_follows(state):
            self._round(state, control, kwargs["model"], kwargs.get("optimizer"))
        if self._settled:
            control.should_training_stop = True
        if control.should_evaluate or control.should_save:
            self.regime.rest(self.masks, self.search)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the adapter as it should be evaluated and saved, and as it stays where training ends here."""
        self.regime.rest(self.masks, self.search)

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

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the rounds and their timings, as `rounds.jsonl` and `timings.jsonl` hold them."""
        return self._rows[ROUNDS_FILE], self._rows[TIMINGS_FILE]

    # Checkpoints

    def state(self) -> State:
        """Return masks, settings and rounds; the search follows from the rounds."""
        values, tensors = super().state()
        values |= {**self._searched_by(), "rows": self._rows, "probed": self._probed()}
        if self.regime.order is not None:
            tensors |= named(PLACES, self.regime.order.by_factor())
        return values, tensors

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up a state of the same settings: the search is told its rounds again.

        Raises:
            GraspError: the state does not fit.
        """
        own = self._searched_by()
        told = {"rounds": own["rounds"], **values}  # checkpoints of earlier versions do not say them
        if any(told.get(name) != own[name] for name in own):
            raise GraspError(
                "training resumes with other settings of policy or rounds than it began with; give it the same, or start anew"
            )
        if values.get("probed", self._probed()) != self._probed():  # checkpoints of earlier versions do not say
            raise GraspError(
                "training resumes with other probed rows than it began with, in other tokens (another tokenizer or template), or "
                "with another number of them in a round; give it the same, or start anew"
            )
        super().restore(values, tensors)
        self._start_anew()
        self._rows = values["rows"]
        for row in self._rows[ROUNDS_FILE]:
            self._tell_again(row)
        if places := of_prefix(PLACES, tensors):
            self.regime.order = self.masks.ranking_of(places)
        self.prune_ratio = self.search.current_ratio

    def _tell_again(self, row: Mapping[str, Any]) -> None:
        decision = self.search.tell(Round.from_json(row))
        found = (self.search.mean, self.search.std, decision.ratio)
        if found != (row["policy_mean"], row["policy_std"], row["ratio"]):
            raise GraspError(
                f"round {row['round']} of the checkpoint led to ratio {row['ratio']}, but told again it leads to "
                f"{decision.ratio}; resume with the versions and on the kind of machine it began with, or start anew"
            )

    def _masked_by(self) -> dict[str, Any]:
        found = super()._masked_by()
        del found["prune_ratio"]
        return found

    def _probed(self) -> str:
        """What rounds measure: their losses are compared with each other."""
        return f"{self.micro_dev.whole.fingerprint()}, {len(self.micro_dev.at(0))} in a round"

    def _searched_by(self) -> dict[str, Any]:
        """What decides the search, as it comes back from JSON."""
        rule = ratio_rule(self.settings.rule).name
        policy, rounds = plain_policy(self.settings.policy), asdict(self.settings.rounds)
        return dict(json.loads(json.dumps({"policy": policy, "rule": rule, "rounds": rounds})))


def _steps_per_epoch(args: TrainingArguments, batches: Any) -> int:
    try:
        count = len(batches)
    except TypeError:
        raise GraspError(
            "rounds.every is 'epoch', but the training data has no length; give a number of optimizer steps"
        ) from None
    return math.ceil(count / args.gradient_accumulation_steps)

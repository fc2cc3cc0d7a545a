"""Several adapters trained side by side on one frozen backbone: A [C, r, d_in] and B [C, d_out, r], two batched products a layer.

Each member has a mask, an order of the examples and an early stopping of its own, and takes the very steps that it would take
alone: equal to rounding without dropout. With dropout members draw from one stream, so that they equal other draws. All factors
of a member lie in a row of one tensor, so that clipping, masks and the optimizer take a few operations for all of them.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from transformers import set_seed

from grasp_lora.errors import DataError, GraspError, Interrupted
from grasp_lora.method.lora import AdapterWeights, LoraPair, added_up
from grasp_lora.method.masks import FACTORS, MaskSet, MaskSettings, WeightKey, in_a_row, views
from grasp_lora.models.adapters import attached
from grasp_lora.models.backbone import supports_logits_to_keep
from grasp_lora.models.live import evaluating, live_pairs, segments_of
from grasp_lora.storage.memory import enough_memory
from grasp_lora.storage.processes import world_size
from grasp_lora.training.finetune import LossRow, leaving_backbone_as_it_was
from grasp_lora.training.loss import Encoded, check_measurable, collate, example_losses
from grasp_lora.training.probes import ProbeSet, calibrate
from grasp_lora.training.settings import TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Losses = Mapping[int, list[float]]  # of each member that still trains, the loss of each example


@dataclass
class Member:
    """One of the adapters that train together.

    Args:
        prune_ratio: at which its mask is held, a fraction in [0, 1].
        seed: of its order of the examples.
        weights: where it starts; afterwards the adapter that is kept, on the CPU.
        keep: its mask, all factors in a row, [weights].
        history: its dev losses.
        best_step: the step whose adapter is kept, 0 for the pruned one before training.
        dev_loss: at that step.
        steps: how many it took.
        failed: why it was given up, None where it was not.
    """

    prune_ratio: float
    seed: int
    weights: AdapterWeights
    keep: Tensor
    history: list[LossRow] = field(default_factory=list)
    best_step: int = 0
    dev_loss: float = math.inf
    steps: int = 0
    failed: str | None = None


def members_of(
    model: "PreTrainedModel",
    start: AdapterWeights,
    ratios: Sequence[float],
    seeds: Sequence[int],
    calibration: ProbeSet,
    mask: MaskSettings,
) -> list[Member]:
    """Return a member for each ratio and seed, all with the same start, in the order of the ratios.

    Args:
        model: the backbone.
        start: the adapter that each is a copy of.
        ratios: fractions in [0, 1].
        seeds: of the orders of the examples.
        calibration: examples on which scores that need inputs are measured.
        mask: the score.
    """
    with attached(model, start) as peft_model:
        masks = MaskSet(live_pairs(peft_model, segments_of(start)), mask)
        calibrate(peft_model, masks, calibration)
        ranking, keep = masks.rank(), {}
        for ratio in ratios:
            by_factor = masks.keep_masks(ratio, ranking)
            # In the order of the start, which need not be that of the layers: in a file layer 10 comes before layer 2.
            in_order = [by_factor[name, factor] for name in start for factor in FACTORS]
            keep[ratio] = in_a_row(in_order, torch.device("cpu"))
    return [Member(ratio, seed, start, keep[ratio]) for ratio in ratios for seed in seeds]


class Stack:
    """The adapters of members as they train, on the backbone.

    Args:
        members: at least one, with starts of the same modules and shapes.
        device: where they train.
        dropout: on what enters a factor A, in training.
    """

    def __init__(self, members: Sequence[Member], device: torch.device, dropout: float) -> None:
        self.pairs, self._dropout = dict(members[0].weights), dropout
        self._shapes = {(name, f): getattr(pair, f).shape for name, pair in self.pairs.items() for f in FACTORS}
        rows = [in_a_row([getattr(one.weights[name], f) for name, f in self._shapes], device) for one in members]
        keep = torch.stack([one.keep for one in members]).to(device)
        self._take(torch.stack(rows).masked_fill_(~keep, 0.0), keep)

    def _take(self, values: Tensor, keep: Tensor) -> None:
        """Hold these weights, [members, weights]; the factors that act are leaves that share their memory."""
        self.values, self._pruned = torch.nn.Parameter(values), ~keep
        self.values.grad = torch.zeros_like(values)
        self._factors = {key: view.requires_grad_() for key, view in self._views(values).items()}
        self._gradients = self._views(self.values.grad)

    def _views(self, rows: Tensor) -> dict[WeightKey, Tensor]:
        """Each factor of all members, [members, ...], as parts of their rows."""
        parts = torch.split(rows.detach(), [shape.numel() for shape in self._shapes.values()], dim=1)
        return {key: part.view(-1, *shape) for (key, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def select(self, places: Sequence[int], optimizer: torch.optim.Optimizer) -> None:
        """Go on with some of the members only, and with what the optimizer knows of them."""
        group, known = optimizer.param_groups[0], optimizer.state.pop(self.values, {})
        chosen = torch.tensor(places, device=self.values.device)
        self._take(self.values.detach()[chosen], ~self._pruned[chosen])
        group["params"] = [self.values]
        if known:
            optimizer.state[self.values] = {k: v[chosen] if v.ndim == 2 else v for k, v in known.items()}

    def take_gradients(self) -> Tensor:
        """Move the gradients of the factors into one tensor, [members, weights], and return that."""
        assert self.values.grad is not None
        found = {key: leaf.grad for key, leaf in self._factors.items() if leaf.grad is not None}
        self.values.grad.zero_()
        if found:
            torch._foreach_copy_([self._gradients[key] for key in found], list(found.values()))
        for leaf in self._factors.values():
            leaf.grad = None
        return self.values.grad

    @staticmethod
    def clip(gradient: Tensor, max_norm: float) -> None:
        """Clip each member's gradient."""
        norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        gradient.mul_((max_norm / (norms + 1e-6)).clamp_(max=1.0))

    @torch.no_grad()
    def enforce(self, rows: Tensor) -> None:
        """Zero what is pruned, [members, weights]."""
        rows.masked_fill_(self._pruned, 0.0)

    def weights(self, row: Tensor) -> AdapterWeights:
        """The adapter of one member's weights in a row."""
        factors = views(row.float().cpu(), self._shapes)
        return AdapterWeights(
            {
                name: LoraPair(factors[name, "A"], factors[name, "B"], pair.scaling, pair.segments, pair.apart)
                for name, pair in self.pairs.items()
            }
        )

    @contextmanager
    def on(self, model: torch.nn.Module) -> Iterator[None]:
        """Let the adapters act on the backbone inside the context, each on its own share of a batch."""
        modules = dict(model.named_modules())
        handles = [modules[name].register_forward_hook(self._hook(name, pair)) for name, pair in self.pairs.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, pair: LoraPair) -> Callable[[torch.nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def add(module: torch.nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            A, B = self._factors[name, "A"], self._factors[name, "B"]
            if inputs[0].ndim != 3:  # whose token is whose could not be told
                raise GraspError(
                    f"{name} reads tokens without their batch, as experts do, so adapters on it cannot be stacked; take another "
                    "preset or method"
                )
            if pair.apart:
                A, B = added_up(A, len(pair.segments), 1), added_up(B, len(pair.segments), 2)
            entering = inputs[0].to(A.dtype).reshape(len(A), -1, A.shape[2])
            entering = torch.nn.functional.dropout(entering, self._dropout, module.training)
            delta = torch.bmm(torch.bmm(entering, A.mT), B.mT) * pair.scaling
            return (output + delta.view(output.shape)).to(output.dtype)

        return add

    @torch.no_grad()
    def losses(self, model: torch.nn.Module, probes: ProbeSet) -> list[list[float]]:
        """Measure every example's loss under every adapter in eval mode, [members][examples]; some may not be finite."""
        count, device = len(self.values), self.values.device
        found = torch.zeros(count, len(probes), device=device, dtype=self.values.dtype)
        with evaluating(model):
            for places, batch in probes.batches(device.type, count):
                copies = {name: part.to(device).repeat(count, 1) for name, part in batch.items()}
                measured = example_losses(model, copies, label_positions=supports_logits_to_keep(model))
                found[:, places] = measured.view(count, -1).to(found.dtype)
        losses: list[list[float]] = found.tolist()
        return losses


def train_stacked(
    model: "PreTrainedModel",
    members: Sequence[Member],
    train: Sequence[Encoded],
    dev: ProbeSet,
    settings: TrainingSettings,
    *,
    pad_id: int,
    dropout: float = 0.0,
    measured_after: Callable[[int], bool] | None = None,
    halve: bool = False,
    on_measured: Callable[[int, Losses], bool] = lambda step, losses: False,
    on_step: Callable[[dict[str, float]], None] | None = None,
    stop_requested: Callable[[], str | None] = lambda: None,
) -> int:
    """Train members together, each under its mask, and leave in each the adapter at its best dev loss.

    Args:
        model: the backbone, without adapters.
        members: of `members_of`; each is filled in.
        train: training examples, at least one.
        dev: examples for early stopping and the choice of the best step.
        settings: of each member's training.
        pad_id: token id for padding.
        dropout: on what enters a factor A.
        measured_after: whether dev is measured after an optimizer step, 0 for before the first; None takes `evaluate_every`.
        halve: whether after each measurement that follows a step only the better half of the members goes on.
        on_measured: told the step and the losses; says whether all training stops.
        on_step: called with step, steps, epoch and loss every few steps, for a progress display.
        stop_requested: asked after each step; names what wants the training to stop.

    Returns:
        Optimizer steps taken.

    Raises:
        DataError: there are no training examples, or one has no prompt or no answer.
        GraspError: several processes run, no weight has a gradient, or the memory does not suffice.
        Interrupted: a stop was asked for; nothing is left of the training.
    """
    if not train:
        raise DataError("there are no training examples; at least one is needed")
    check_measurable(train)
    if world_size() > 1:
        raise GraspError(
            "adapters are stacked in one process only; start without torchrun, or take another preset or method"
        )
    if settings.gradient_checkpointing:
        raise GraspError(
            "stacked adapters train without gradient_checkpointing; leave it out, or take another preset or method"
        )
    per_epoch, steps = settings.steps_per_epoch(len(train)), settings.steps(len(train))
    every = settings.evaluate_steps(per_epoch)
    is_measured = measured_after or (lambda step: step % every == 0 or step == steps)
    set_seed(members[0].seed)
    device = next(model.parameters()).device
    stack = Stack(members, device, dropout)
    kept = stack.values.detach().clone()
    optimizer = torch.optim.AdamW([stack.values], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    acting, bad, step = list(range(len(members))), [0] * len(members), 0
    lowest = [math.inf] * len(members)  # dev losses: a member's own is that of its last step where that is kept

    def measure() -> bool:
        """Measure those that act, drop those that have ended, and say whether none is left."""
        nonlocal acting
        losses = dict(zip(acting, stack.losses(model, dev), strict=True))
        for row, place in enumerate(acting):
            one, loss = members[place], fmean(losses[place])
            if not math.isfinite(loss):
                one.failed = (
                    f"the dev loss is {loss} at step {step}; lower the learning rate (now {settings.learning_rate})"
                )
                del losses[place]
                continue
            one.steps = step
            one.history.append({"step": step, "epoch": step / per_epoch, "dev_loss": loss})
            better = loss < lowest[place]
            lowest[place] = min(loss, lowest[place])
            bad[place] = 0 if better else bad[place] + 1
            if better or settings.keep == "last":
                one.dev_loss, one.best_step = loss, step
                kept[place] = stack.values.detach()[row]
        stopped = bool(losses) and on_measured(step, losses)
        going = [place for place in losses if settings.patience is None or bad[place] < settings.patience]
        if halve and step:
            going = sorted(going, key=lambda place: members[place].dev_loss)[: math.ceil(len(going) / 2)]
        if going and len(going) < len(acting):
            stack.select([acting.index(place) for place in sorted(going)], optimizer)
        acting = sorted(going)
        return stopped or not acting

    def take_step(orders: Mapping[int, Sequence[int]], first: int, told: bool) -> None:
        end = min(first + settings.batch_size * settings.accumulation, len(train))
        total = torch.zeros((), device=device)
        for start in range(first, end, settings.batch_size):
            rows = range(start, min(start + settings.batch_size, end))
            examples = [train[orders[members[place].seed][row]] for place in acting for row in rows]
            batch = {name: part.to(device) for name, part in collate(examples, pad_id).items()}
            losses = example_losses(model, batch, label_positions=supports_logits_to_keep(model))
            loss = losses.sum() / (end - first)
            torch.autograd.backward(loss)
            total += loss.detach()
        gradient = stack.take_gradients()
        if step == 0 and not gradient.any() and stack.values.any():
            raise GraspError(
                "no LoRA weight has a gradient, so nothing would be trained; the backbone's layers cut gradients: load it "
                "unquantised, or take another preset or method"
            )
        if settings.max_grad_norm:
            stack.clip(gradient, settings.max_grad_norm)  # all of it, as the Trainer does
        stack.enforce(gradient)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * settings.lr_decay ** (step // per_epoch)
        optimizer.step()
        stack.enforce(stack.values)
        if told and on_step is not None:
            on_step(
                {"step": step + 1, "steps": steps, "epoch": (step + 1) / per_epoch, "loss": float(total) / len(acting)}
            )

    less = "stack fewer ratios, lower this training's batch_size or data.max_tokens, or set backbone.dtype to bfloat16"
    with leaving_backbone_as_it_was(model), stack.on(model), enough_memory("the stacked training", less):
        model.train()
        done = is_measured(0) and measure()
        for epoch in itertools.count():
            if done or step >= steps:
                break
            orders = {seed: _order(len(train), seed, epoch) for seed in {one.seed for one in members}}
            for first in range(0, len(train), settings.batch_size * settings.accumulation):
                take_step(orders, first, step % max(1, min(10, per_epoch // 5)) == 0)
                step += 1
                done = (is_measured(step) and measure()) or step >= steps
                if done:
                    break
                if reason := stop_requested():
                    raise Interrupted(
                        f"stopped by {reason} in a stacked training; run the same command again to do it anew"
                    )
    for place in acting:
        members[place].steps = step
    for place, one in enumerate(members):
        one.weights = stack.weights(kept[place])
    return step


def _order(examples: int, seed: int, epoch: int) -> list[int]:
    """The order in which the Trainer takes so many examples in an epoch."""
    sampler = SeedableRandomSampler(range(examples), data_seed=seed)
    sampler.set_epoch(epoch)
    return [int(place) for place in sampler]

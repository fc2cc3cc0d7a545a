"""Probes: fixed examples whose losses are measured again and again, and what scores need to know of their inputs.

`ProbeSet(examples, pad_id).losses(model)` is the mean answer NLL of each example, in their order, by the loss that training has.
The model, its modes and every random state are as before afterwards, so that to measure changes nothing of a training.

`ProbesInTurn` is a pool of which each controller round takes a few: round 0 the examples 0 to 6, round 1 those after them, and
around again. `Probe` is what a reward of one's own is computed from: losses or answers.
`calibrate` gives a mask set the norms of what enters each LoRA factor, where its score needs them.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grasp_lora.errors import AdapterError, ProbeError
from grasp_lora.method.masks import InputNorms, MaskSet
from grasp_lora.models.backbone import supports_logits_to_keep
from grasp_lora.models.generation import answer, losses_after, share_contexts
from grasp_lora.models.live import active_adapter, evaluating, lora_layers
from grasp_lora.models.loss import (
    Encoded,
    check_measurable,
    collate,
    example_losses,
)
from grasp_lora.models.model_settings import GenerationSettings
from grasp_lora.storage.memory import enough_memory
from grasp_lora.text.display import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_BUDGET = 2048  # of a measured batch: on two CPU cores 4096 took 1.1 to 1.2 times as long (`lab/log.md`)
_LABEL_BUDGET = 512  # bounds the logits of a batch: 512 positions x 262k vocabulary in float32 are 0.5 GB
_ON_ACCELERATOR = 4  # as many times the tokens and labels in a batch; not measured, `make gpu` does


class ProbeSet:
    """A fixed set of examples, tokenised and batched once, whose losses are measured again and again.

    Args:
        examples: at least one, each with a completion.
        pad_id: token id for padding.
        token_budget: most tokens, padding included, in one batch; None takes what suits the device.

    Raises:
        DataError: there are no examples, or one has no prompt or no completion.
    """

    def __init__(self, examples: Sequence[Encoded], pad_id: int, token_budget: int | None = None) -> None:
        check_measurable(examples)
        self.ids = [example.id for example in examples]
        self._examples, self._pad_id, self._token_budget = list(examples), pad_id, token_budget
        self._batches: dict[int, list[tuple[list[int], dict[str, Tensor]]]] = {}
        self._shares: bool | None = None  # once a model has said it

    def batches(self, device: str = "cpu") -> list[tuple[list[int], dict[str, Tensor]]]:
        """The batches for a type of device, made once, each with the places of its examples; they lie on the CPU."""
        share = 1 if device == "cpu" else _ON_ACCELERATOR
        if share not in self._batches:
            self._batches[share] = self._batched(share)
        return self._batches[share]

    def _batched(self, share: int) -> list[tuple[list[int], dict[str, Tensor]]]:
        """Examples of like length side by side, so that little is padded, up to a budget of tokens and one of labels."""
        examples, token_budget = self._examples, self._token_budget or share * TOKEN_BUDGET
        lengths = [len(example.prompt_ids) + len(example.completion_ids) for example in examples]
        batches: list[list[int]] = []
        batch: list[int] = []
        label_tokens = 0
        for index in sorted(range(len(examples)), key=lengths.__getitem__):
            labels = len(examples[index].completion_ids)
            full = (len(batch) + 1) * lengths[index] > token_budget or label_tokens + labels > share * _LABEL_BUDGET
            if batch and full:
                batches.append(batch)
                batch, label_tokens = [], 0
            batch.append(index)
            label_tokens += labels
        return [(batch, collate([examples[i] for i in batch], self._pad_id)) for batch in (*batches, batch)]

    @classmethod
    def from_rows(
        cls, rows: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase", token_budget: int | None = None
    ) -> "ProbeSet":
        """Build a set from rows in TRL's prompt/completion convention (texts, or lists of messages)."""
        return cls(*encoded_rows(rows, tokenizer), token_budget)

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """A hash of the tokens of all examples, in their order."""
        tokens = [[list(example.prompt_ids), list(example.completion_ids)] for example in self._examples]
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]

    @property
    def whole(self) -> "ProbeSet":
        """All examples."""
        return self

    def at(self, number: int) -> "ProbeSet":
        """The examples of a controller round: all of them in each; see `ProbesInTurn`."""
        return self

    def places(self, number: int) -> tuple[int, ...] | None:
        """The places in `whole` of the examples of a round; None for all of them."""
        return None

    @torch.no_grad()
    def losses(self, model: torch.nn.Module, collector: "NormCollector | None" = None) -> list[float]:
        """Measure every example's loss in eval mode; the training mode and the random state are as before afterwards.

        In a distributed run every rank measures all of them, so that sharded models stay in step, and all get the mean.

        Args:
            model: with or without adapters.
            collector: told which tokens are padding.

        Raises:
            ProbeError: a loss is not a finite number; the message names the example.
        """
        weight = next(model.parameters())
        device, label_positions = weight.device, supports_logits_to_keep(model)
        losses = torch.zeros(len(self.ids), device=device, dtype=torch.promote_types(weight.dtype, torch.float32))
        prompts = [example.prompt_ids for example in self._examples]
        if self._shares is None:
            self._shares = share_contexts(model, prompts)
        with (
            evaluating(model),
            enough_memory(
                "measuring losses", "lower data.max_tokens, or set backbone.dtype to bfloat16 if it is float32"
            ),
        ):
            shared = self._shares and collector is None  # a collector has to see each token of each row
            if shared:
                found = losses_after(model, prompts, [example.completion_ids for example in self._examples])
                losses = torch.tensor(found, device=device, dtype=losses.dtype)
            for indices, batch in () if shared else self.batches(device.type):
                on_device = {name: tensor.to(device) for name, tensor in batch.items()}
                if collector is not None:
                    collector.token_mask = on_device["attention_mask"]
                losses[indices] = example_losses(model, on_device, label_positions=label_positions)
        losses = averaged(losses)
        values: list[float] = losses.tolist()
        for example, value, finite in zip(self.ids, values, torch.isfinite(losses).tolist(), strict=True):
            if not finite:
                ways = "lower the learning rate, or check the example and the adapters"
                if weight.dtype == torch.float16:
                    ways = "set backbone.dtype to float32, since float16 may overflow; else " + ways
                raise ProbeError(f"the loss of example {example} is {value}, not a finite number; {ways}")
        return values


class ProbesInTurn:
    """A pool of examples of which each controller round measures a few, in turn.

    A round compares ratios on its own examples, so that rounds need not share any: many have their say at the cost of few. Where
    nothing compares one round with another, that is all. Else the baseline of each round is measured on the whole pool, as early
    stopping measures a dev set, and what a candidate differs by from it on the few is taken for its difference on all.

    Args:
        examples: the pool.
        pad_id: token id for padding.
        count: examples of a round, between 1 and the size of the pool.
        seed: of the order in which they take turns.
    """

    def __init__(self, examples: Sequence[Encoded], pad_id: int, count: int, seed: int) -> None:
        self._examples = list(examples)
        random.Random(f"{seed}/turns").shuffle(self._examples)
        self._pad_id, self.count = pad_id, count
        self._whole: ProbeSet | None = None

    @property
    def whole(self) -> ProbeSet:
        """All examples of the pool, in the order of their turns."""
        if self._whole is None:
            self._whole = ProbeSet(self._examples, self._pad_id)
        return self._whole

    def places(self, number: int) -> tuple[int, ...]:
        """The places in `whole` of the examples of a round, numbered from 0."""
        return tuple((number * self.count + place) % len(self._examples) for place in range(self.count))

    def at(self, number: int) -> ProbeSet:
        """The examples of a round, numbered from 0."""
        return ProbeSet([self._examples[place] for place in self.places(number)], self._pad_id)


def encoded_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Sequence[Encoded], int]:
    """Tokenise rows in TRL's prompt/completion convention; return the examples and the token id for padding."""
    from grasp_lora.data.encode import encode_rows

    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return encode_rows(rows, tokenizer), int(pad_id)


def probes_of(examples: Sequence[Encoded], pad_id: int, turn: int | None, seed: int) -> ProbeSet | ProbesInTurn:
    """The probes of a pool: all of it in each round, or `turn` examples at a time in the order of a seed."""
    return ProbeSet(examples, pad_id) if turn is None else ProbesInTurn(examples, pad_id, turn, seed)


class Probe:
    """What a reward of one's own is computed from: the model under the mask of one ratio, and the rows it is probed on.

    `losses` and `answers` are computed when they are asked for, once each.

    Args:
        model: as it is pruned now.
        examples: the probed rows, encoded; their `references` are the right answers.
        probes: the same, as a set.
        tokenizer: of the rows.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        examples: Sequence[Any],
        probes: ProbeSet,
        tokenizer: "PreTrainedTokenizerBase",
    ) -> None:
        self.model, self.examples = model, examples
        self._probes, self._tokenizer = probes, tokenizer

    @property
    def references(self) -> list[str]:
        """The right answer to each row, without the white space around it, as `answers` has them."""
        return [example.references[0].strip() for example in self.examples]

    @cached_property
    def losses(self) -> list[float]:
        """The answer NLL of each row, nats per token."""
        return self._probes.losses(self.model)

    @cached_property
    def answers(self) -> list[str]:
        """The greedy answer to each row, at most as long as the longest right one, on one line."""
        longest = max(len(example.completion_ids) for example in self.examples)
        prompts = [example.prompt_ids for example in self.examples]
        ends = {example.completion_ids[-1] for example in self.examples}
        settings = GenerationSettings(max_new_tokens=longest)
        return [text for text, _ in answer(self.model, self._tokenizer, prompts, settings, ends=ends)]


Reward = Callable[[Probe], float | Sequence[float]]


def rewarded(reward: Reward, probe: Probe) -> list[float]:
    """What a reward of one's own gives for a probe, as losses: its negative, one number or one a row.

    Raises:
        ProbeError: it gives no finite number, or neither one nor one a row.
    """
    given: Any = reward(probe)
    given = given.tolist() if hasattr(given, "tolist") else given  # of PyTorch or NumPy
    values = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    name, rows = getattr(reward, "__name__", type(reward).__name__), len(probe.examples)
    wrong = [quoted(value) for value in values if not isinstance(value, Real | Tensor) or not math.isfinite(value)]
    if len(values) not in (1, rows):
        wrong = [f"{len(values)} values"]
    if wrong:
        raise ProbeError(
            f"reward {name} gave {wrong[0]}; it must return a finite number, or one for each of the {rows} rows"
        )
    return [-float(value) for value in values]


class NormCollector:
    """Sums of squares of what enters the LoRA factors, gathered by hooks while the context is open.

    PEFT never calls the factors of an embedding, so they have none, nor those of a parameter (`target_parameters`): theirs are 0.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.token_mask: Tensor | None = None
        self._adapter = active_adapter(model)
        layers = lora_layers(model, self._adapter)
        self._layers = {name: layer for name, layer in layers.items() if self._adapter in layer.lora_A}
        # All of them from the start, so that ranks add up the same ones in the same order (a rank may never call an expert).
        self._sums = {
            (name, factor): torch.zeros(module.in_features, device=module.weight.device)
            for name, layer in self._layers.items()
            for factor, module in self._factors(layer)
        }

    def _factors(self, layer: Any) -> tuple[tuple[str, Any], tuple[str, Any]]:
        return ("A", layer.lora_A[self._adapter]), ("B", layer.lora_B[self._adapter])

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Hook the layers inside the context."""
        handles = []
        for name, layer in self._layers.items():
            for factor, module in self._factors(layer):
                handles.append(module.register_forward_pre_hook(self._hook(name, factor)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def norms(self) -> dict[str, InputNorms]:
        """Return the norms gathered so far, one a module; in a distributed run over all ranks."""
        sums = {key: averaged(total.clone()) for key, total in self._sums.items()}
        return {name: InputNorms(sums[name, "A"].sqrt(), sums[name, "B"].sqrt()) for name in self._layers}

    def _hook(self, name: str, factor: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].detach().float()
            if self.token_mask is not None and values.shape[:-1].numel() == self.token_mask.numel():
                mask = self.token_mask.to(values.device)  # which may be another card than that of the ids
                values = values * mask.reshape(*values.shape[:-1], 1)  # some models flatten the batch
            self._sums[name, factor] += values.flatten(0, -2).square().sum(0)

        return add


def calibrate(model: torch.nn.Module, masks: MaskSet, examples: ProbeSet) -> list[float] | None:
    """Give the mask set what its score needs, measured on these examples with the weights as they are.

    Returns:
        The losses of the examples where a forward pass was needed anyway, else None.

    Raises:
        AdapterError: nothing entered a module, so that its weights would be pruned by their position.
    """
    if not masks.settings.needs_inputs:
        return None
    collector = NormCollector(model)
    with collector.collecting():
        losses = examples.losses(model, collector)
    masks.norms = collector.norms()
    for module in masks.pairs:
        if module not in masks.norms or not masks.norms[module].A.any():
            raise AdapterError(
                f"score {quoted(masks.settings.score)} needs what enters each LoRA module, and nothing was seen to enter "
                f"{module}; use 'magnitude', the only way for embeddings and target_parameters, or examples that reach it"
            )
    return losses


def averaged(values: Tensor) -> Tensor:
    """The mean over all processes of what each has measured, so that all of them decide alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values

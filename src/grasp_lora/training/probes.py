"""Probes: fixed examples whose losses are measured again and again, and what scores need to know of their inputs.

`ProbeSet(examples).losses(model)` is the mean answer NLL of each example, in their order, by the loss that training has.
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

from grasp_lora.data.encode import encode_rows
from grasp_lora.errors import AdapterError, ProbeError
from grasp_lora.method.masks import InputNorms, MaskSet
from grasp_lora.models.generation import answer, losses_after
from grasp_lora.models.live import active_adapter, lora_layers
from grasp_lora.models.loss import Encoded, check_measurable
from grasp_lora.models.model_settings import GenerationSettings
from grasp_lora.text.display import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ProbeSet:
    """A fixed set of examples, tokenised and batched once, whose losses are measured again and again.

    Args:
        examples: at least one, each with a completion.

    Raises:
        DataError: there are no examples, or one has no prompt or no completion.
    """

    def __init__(self, examples: Sequence[Encoded]) -> None:
        check_measurable(examples)
        self.ids = [example.id for example in examples]
        self._examples = list(examples)

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> "ProbeSet":
        """Build a set from rows in TRL's prompt/completion convention (texts, or lists of messages)."""
        return cls(encode_rows(rows, tokenizer))

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
        watch = None if collector is None else collector.watch
        prompts, right = zip(*((one.prompt_ids, one.completion_ids) for one in self._examples), strict=True)
        losses = averaged(losses_after(model, prompts, right, watch).to(weight.device))
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
        count: examples of a round, between 1 and the size of the pool.
        seed: of the order in which they take turns.
    """

    def __init__(self, examples: Sequence[Encoded], count: int, seed: int) -> None:
        self._examples = list(examples)
        random.Random(f"{seed}/turns").shuffle(self._examples)
        self.count = count
        self._whole: ProbeSet | None = None

    @property
    def whole(self) -> ProbeSet:
        """All examples of the pool, in the order of their turns."""
        if self._whole is None:
            self._whole = ProbeSet(self._examples)
        return self._whole

    def places(self, number: int) -> tuple[int, ...]:
        """The places in `whole` of the examples of a round, numbered from 0."""
        return tuple((number * self.count + place) % len(self._examples) for place in range(self.count))

    def at(self, number: int) -> ProbeSet:
        """The examples of a round, numbered from 0."""
        return ProbeSet([self._examples[place] for place in self.places(number)])


def probes_of(examples: Sequence[Encoded], turn: int | None, seed: int) -> ProbeSet | ProbesInTurn:
    """The probes of a pool: all of it in each round, or `turn` examples at a time in the order of a seed."""
    return ProbeSet(examples) if turn is None else ProbesInTurn(examples, turn, seed)


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
        self._mask: Tensor | None = None
        self._adapter = active_adapter(model)
        layers = lora_layers(model, self._adapter)
        self._layers = {name: layer for name, layer in layers.items() if self._adapter in layer.lora_A}
        # All of them from the start, so that ranks add up the same ones in the same order (a rank may never call an expert).
        self._sums = {
            (name, factor): torch.zeros(module.in_features, device=module.weight.device)
            for name, layer in self._layers.items()
            for factor, module in self._factors(layer)
        }

    def watch(self, mask: Tensor) -> None:
        """Take which tokens of the next pass count, [rows, tokens]; without it all do."""
        self._mask = mask

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
            if self._mask is not None and values.shape[:-1].numel() == self._mask.numel():
                mask = self._mask.to(values.device)
                values = values * mask.reshape(*values.shape[:-1], 1)  # some models flatten the batch
            self._sums[name, factor] += values.flatten(0, -2).square().sum(0)

        return add


def calibrate(model: torch.nn.Module, masks: MaskSet, examples: ProbeSet) -> None:
    """Give the mask set what its score needs, measured on these examples with the weights as they are.

    Raises:
        AdapterError: nothing entered a module, so that its weights would be pruned by their position.
    """
    if not masks.settings.needs_inputs:
        return
    collector = NormCollector(model)
    with collector.collecting():
        examples.losses(model, collector)
    masks.norms = collector.norms()
    for module in masks.pairs:
        if module not in masks.norms or not masks.norms[module].A.any():
            raise AdapterError(
                f"score {quoted(masks.settings.score)} needs what enters each LoRA module, and nothing was seen to enter "
                f"{module}; use 'magnitude', the only way for embeddings and target_parameters, or examples that reach it"
            )


def averaged(values: Tensor) -> Tensor:
    """The mean over all processes of what each has measured, so that all of them decide alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values

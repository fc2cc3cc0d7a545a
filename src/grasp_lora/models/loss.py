"""The one loss of this project: the mean over examples of the mean negative log-likelihood of the answer's tokens.

Training, dev sets, probes and test rows use it, so their numbers can be compared; the last from where they are answered.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from grasp_lora.errors import DataError

IGNORED = -100  # the label of positions without loss, in all of transformers


class Encoded(Protocol):
    """A tokenised example (`data.Example` is one)."""

    @property
    def id(self) -> str: ...
    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def completion_ids(self) -> Sequence[int]: ...


def collate(examples: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """Pad examples on the right into input_ids, attention_mask and labels, each [examples, longest]."""
    return collate_pairs([(example.prompt_ids, example.completion_ids) for example in examples], pad_id)


def collate_pairs(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> dict[str, Tensor]:
    """The same of token ids of prompts and completions."""
    length = max(len(prompt) + len(completion) for prompt, completion in pairs)
    input_ids = torch.full((len(pairs), length), pad_id)
    attention_mask = torch.zeros(len(pairs), length, dtype=torch.long)
    labels = torch.full((len(pairs), length), IGNORED)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor([*prompt, *completion])
        attention_mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(list(completion))
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def check_measurable(examples: Sequence[Encoded]) -> None:
    """Check that there are examples, and that every one has a loss.

    Raises:
        DataError: there are none, or one has no prompt or no answer; the message names it.
    """
    bad = [example.id for example in examples if not (example.prompt_ids and example.completion_ids)]
    if bad or not examples:
        missing = f"{', '.join(bad[:5])} lack one" if bad else "there are none"
        raise DataError(
            f"examples to train on or to measure need a prompt and an answer, but {missing}; correct or add them"
        )


def example_losses(
    model: torch.nn.Module,
    batch: Mapping[str, Tensor],
    *,
    label_positions: bool,
) -> Tensor:
    """Return each example's mean answer NLL, float32 or finer, [examples]; 0 for one without a label.

    Args:
        model: causal language model, with or without adapters, wrapped or not.
        batch: of `collate`, on the model's device.
        label_positions: what `supports_logits_to_keep` says of the model.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    # Position i predicts token i + 1.
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    counts = (targets != IGNORED).sum(1).clamp(min=1)
    scores = target_scores(model, inputs, targets, label_positions=label_positions)
    return summed_losses(scores, targets) / counts


def target_scores(
    model: torch.nn.Module, inputs: Mapping[str, Any], targets: Tensor, *, label_positions: bool
) -> Tensor:
    """Return the vocabulary's scores (logits) where a target counts, row by row, float32 or finer, [targets, vocabulary].

    Args:
        targets: at each position the token after it, `IGNORED` where that does not count; [rows, tokens], on the model's device.
        label_positions: what `supports_logits_to_keep` says of the model.
    """
    counts = targets != IGNORED
    # A mask, not a number: in bfloat16 a processor copies the whole output layer for a slice of several rows.
    output = model(**inputs, logits_to_keep=counts) if label_positions else model(**inputs)
    # A model may be spread over devices.
    logits: Tensor = output.logits if label_positions else output.logits[counts.to(output.logits.device)]
    logits = logits.view(-1, logits.shape[-1])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def summed_losses(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of each row's token NLLs, [rows], from `target_scores` and its targets."""
    targets = targets.to(scores.device)
    counts = targets != IGNORED
    losses = torch.nn.functional.cross_entropy(scores, targets[counts], reduction="none")
    return losses.new_zeros(len(targets)).index_add(0, counts.nonzero()[:, 0], losses)

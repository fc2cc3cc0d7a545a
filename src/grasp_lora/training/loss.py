"""The one loss of this project: the mean over examples of the mean negative log-likelihood of the answer's tokens.

Training, dev sets and probes use it, so their numbers can be compared. Test rows have the same mean from where they are answered
(`models.generation`), which is the same number but for rounding.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

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
    length = max(len(example.prompt_ids) + len(example.completion_ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad_id)
    attention_mask = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORED)
    for row, example in enumerate(examples):
        prompt, completion = list(example.prompt_ids), list(example.completion_ids)
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        attention_mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(completion)
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
    labels = batch["labels"]
    # Position i predicts token i + 1.
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][predicts[:, :-1]]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    output = model(**inputs, logits_to_keep=predicts) if label_positions else model(**inputs)
    logits = output.logits if label_positions else output.logits[predicts]
    logits = logits.view(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
    token_losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    counts = predicts.sum(1)
    rows = torch.arange(len(labels), device=labels.device).repeat_interleave(counts, output_size=len(targets))
    return token_losses.new_zeros(len(labels)).index_add(0, rows, token_losses) / counts.clamp(min=1)

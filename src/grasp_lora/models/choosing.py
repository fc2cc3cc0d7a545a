"""Labels in place of answers: token ids of prompts and of labels in, how likely each label is out."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch

from grasp_lora.models.backbone import supports_logits_to_keep, without_peft
from grasp_lora.models.caches import can_share_rows
from grasp_lora.models.company import Company
from grasp_lora.models.generation import check_lengths, contiguous_head_input, less_memory, no_numbers
from grasp_lora.models.live import evaluating
from grasp_lora.models.settings import GenerationSettings
from grasp_lora.storage.memory import enough_memory

_LABEL_BUDGET = 512  # tokens of labels in a batch: each has scores of a whole vocabulary
_PADDING = -100


@torch.no_grad()
def label_scores(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    settings: GenerationSettings,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Return the log-probability of each label after each prompt: the sum over its tokens, the end token among them.

    It is that of the whole answer, and not divided by its length. The end token makes labels comparable of which one begins
    another: the shorter one gets what the model gives to the end there, the longer one a part of the rest. A prompt is read once
    for all labels where the model's cache allows it. The model may be wrapped by PEFT; it is left as it was.

    Args:
        model: causal language model, on its device.
        prompts: token ids of each prompt.
        labels: token ids of each label, the end token last.
        settings: the most rows and tokens of a batch.
        progress: called after each prompt with those done so far and their total.

    Returns:
        For each prompt one number <= 0 a label.

    Raises:
        DataError: a prompt is empty, or too long for the model's context with a label after it.
        ProbeError: a score is no number.
    """
    inner = without_peft(model)
    longest = max(map(len, labels))
    check_lengths(inner, prompts, replace(settings, max_new_tokens=longest))
    company = Company(inner, lambda token: inner(input_ids=token, use_cache=False))
    shares = True
    found: list[list[float]] = []
    with (
        evaluating(inner),
        contiguous_head_input(inner),
        enough_memory("scoring labels", less_memory(settings)),
    ):
        for prompt in prompts:
            cache = _read(inner, prompt[:-1], company) if shares and len(prompt) > 1 else None
            shares = cache is not None or len(prompt) == 1
            together = settings.batch_tokens // (len(prompt) + longest)
            rows = max(1, min(settings.batch_size, together, _LABEL_BUDGET // longest))
            batches = (labels[start : start + rows] for start in range(0, len(labels), rows))
            scores = [score for batch in batches for score in _score(inner, prompt, cache, batch, company)]
            if any(map(math.isnan, scores)):
                raise no_numbers(inner)
            found.append(scores)
            if progress is not None:
                progress(len(found), len(prompts))
        company.keep()
    return found


def likeliest_labels(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    labels: Mapping[str, Sequence[int]],
    settings: GenerationSettings,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Return the likeliest label after each prompt, the first of equal ones.

    Args:
        labels: label -> token ids.
        model, prompts, settings, progress: as of `label_scores`.

    Raises:
        DataError, ProbeError: as of `label_scores`.
    """
    scores = label_scores(model, prompts, list(labels.values()), settings, progress)
    return [max(zip(of_prompt, labels, strict=True), key=itemgetter(0))[1] for of_prompt in scores]


def _read(model: Any, tokens: Sequence[int], company: Company) -> Any:
    """The cache of a model that has read these tokens; None where it cannot serve several rows."""
    ids = torch.tensor([tokens], device=model.device)
    keep = {"logits_to_keep": torch.zeros_like(ids, dtype=torch.bool)} if supports_logits_to_keep(model) else {}
    company.calls()
    cache = getattr(model(input_ids=ids, use_cache=True, **keep), "cache", None)
    return cache if can_share_rows(cache) else None


def _score(
    model: Any, prompt: Sequence[int], cache: Any, labels: Sequence[Sequence[int]], company: Company
) -> list[float]:
    """Score a batch of labels; a cache holds all but the last token of the prompt."""
    seen = 0 if cache is None else len(prompt) - 1
    width = max(map(len, labels))
    # The last token of each row is only predicted. Padding stands behind it, where nothing that counts sees it.
    ids = torch.zeros((len(labels), len(prompt) - seen + width - 1), dtype=torch.long)
    mask = torch.zeros((len(labels), len(prompt) + width - 1), dtype=torch.long)
    targets = torch.full((len(labels), width), _PADDING)
    for row, label in enumerate(labels):
        tokens = [*prompt[seen:], *label[:-1]]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : seen + len(tokens)] = 1
        targets[row, : len(label)] = torch.tensor(label)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device), "use_cache": False}
    if cache is not None:
        own = copy.deepcopy(cache)  # a call adds to it
        own.batch_repeat_interleave(len(labels))
        inputs |= {"cache": own, "use_cache": True}
    if supports_logits_to_keep(model):
        # A mask, not a number: in bfloat16 a processor copies the whole output layer for a slice of several rows.
        kept = torch.zeros_like(ids, dtype=torch.bool)
        kept[:, -width:] = True
        inputs["logits_to_keep"] = kept.to(model.device)
    company.calls()
    logits = model(**inputs).logits
    logits = logits.view(len(labels), -1, logits.shape[-1])[:, -width:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(
        logits, targets.to(logits.device), reduction="none", ignore_index=_PADDING
    )
    scores: list[float] = (-losses.sum(dim=1)).tolist()
    return scores

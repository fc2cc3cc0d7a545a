"""Trainings of few rows with a loss on the prompt's tokens, too (arXiv 2401.13586). The plan is in `lab/log.md`.

    python lab/prompt_loss.py draw SETTING DRAW FOLDER      # settings and draws of few_rows.py; FOLDER holds its steps
    python lab/prompt_loss.py sampled SETTING DRAW FOLDER   # the same with a few of the prompt's tokens, drawn anew each step
    python lab/prompt_loss.py table FILE [FILE ...]         # prompt-*.json: differences, with 95 % intervals over the draws

Needs GRASP_LORA_DATA.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from few_rows import interval, measured, on_xquad, steps_of
from torch import Tensor

from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import Store
from grasp_lora.storage.claims import Workplace, working_in
from grasp_lora.storage.writing import write_json
from grasp_lora.training.loss import IGNORED

WEIGHT = 0.05  # of a prompt's token; one of the answer counts 1
SAMPLED = 32  # tokens of a prompt that count for all of them


def weighted_losses(model: torch.nn.Module, batch: Mapping[str, Tensor], *, label_positions: bool) -> Tensor:
    """Each example's mean NLL over all its tokens, those of the prompt with a weight."""
    tokens, answers, there = (batch[key][:, 1:] for key in ("input_ids", "labels", "attention_mask"))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens, reduction="none")
    weights = torch.where(answers != IGNORED, 1.0, WEIGHT) * there
    return (losses * weights).sum(1) / weights.sum(1)


def sampled_losses(model: torch.nn.Module, batch: Mapping[str, Tensor], *, label_positions: bool) -> Tensor:
    """The same from a few tokens of each prompt, which count for all: the head, most of the cost, reads no others."""
    tokens, answers, there = (batch[key][:, 1:] for key in ("input_ids", "labels", "attention_mask"))
    answering = answers != IGNORED
    prompts = there.bool() & ~answering
    order = torch.rand(prompts.shape, device=prompts.device).masked_fill(~prompts, -1.0)
    taken = torch.zeros_like(prompts).scatter(1, order.topk(min(SAMPLED, prompts.shape[1]), dim=1).indices, True)
    taken &= prompts
    shares = WEIGHT * prompts.sum(1, keepdim=True) / taken.sum(1, keepdim=True)
    weights = answering + taken * shares
    kept = torch.zeros_like(batch["labels"], dtype=torch.bool)
    kept[:, :-1] = weights > 0
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    logits = model(**inputs, logits_to_keep=kept).logits
    losses = torch.zeros_like(weights).masked_scatter(
        kept[:, :-1],
        torch.nn.functional.cross_entropy(
            logits.view(-1, logits.shape[-1]).float(), tokens[kept[:, :-1]], reduction="none"
        ),
    )
    return (losses * weights).sum(1) / weights.sum(1)


LOSSES = {"draw": ("prompt", weighted_losses), "sampled": ("sampled", sampled_losses)}  # by the words of the command


def draw_of(kind: str, setting: str, draw: int, folder: Path, work: Workplace) -> None:
    place, loss = LOSSES[kind]
    steps = steps_of(setting, draw, folder, work)
    if kind == "sampled" and setting == "zh":  # whose own test rows are few
        steps = on_xquad(steps, work)
    starts = {"continued": steps.source(), "grasp": steps.parents().merged}
    # A store of its own: the steps' keys do not know of the loss.
    apart = Store(folder / place, steps.session.progress, work)
    other = Steps(steps.session, apart, steps.session, stop_requested=lambda: work.interruption.asked_by)
    record: dict[str, Any] = {"setting": setting, "draw": draw, "systems": {}}
    for name, start in starts.items():
        record["systems"][name] = measured(steps, steps.finetune(start, 0.0))
        with patch("grasp_lora.training.trainer.example_losses", loss):
            adapter = other.finetune(start, 0.0)
        record["systems"][f"{name}, prompts"] = measured(other, adapter)
    write_json(folder / f"{place}-{setting}-{draw}.json", record)


def table(draws: Sequence[dict[str, Any]]) -> Iterator[str]:
    kinds = ("continued", "grasp")
    for setting in dict.fromkeys(draw["setting"] for draw in draws):
        of_setting = [draw["systems"] for draw in draws if draw["setting"] == setting]
        for names in (*[(kind,) for kind in kinds], kinds):
            told = []
            for key, digits in {"test_scores": 1, "test_losses": 3}.items():
                pairs = [
                    [fmean(systems[f"{name}{end}"][key]) for end in (", prompts", "")]
                    for systems in of_setting
                    for name in names
                ]
                gaps = [ours - theirs for ours, theirs in pairs]
                told.append(f"{' '.join(f'{gap:+.{digits}f}' for gap in gaps)}: {interval(gaps, digits)}")
            yield f"{setting}, {' and '.join(names)}, with the prompts' loss minus without: {'; '.join(told)}"


def main(job: str, *words: str) -> None:
    if job == "table":
        sys.stdout.write("\n".join(table([json.loads(Path(file).read_bytes()) for file in words])) + "\n")
        return
    setting, draw, place = words
    with working_in(Path(place)) as work:
        work.begin(shared=True)
        draw_of(job, setting, int(draw), Path(place), work)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What will happen before it happens: the checks of `grasp-lora check`, as lines a person reads."""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from grasp_lora.bench.checks import check, check_files, expected_rounds
from grasp_lora.bench.doubts import Finding, doubtful, labels, written_answers
from grasp_lora.bench.measuring import choosing_splits
from grasp_lora.bench.planned import PLANNED, SEEDS, expected_width
from grasp_lora.bench.progress import Progress
from grasp_lora.bench.session import Session
from grasp_lora.data.encode import Example, Tally
from grasp_lora.data.splits import SPLITS, group_numbers, group_size
from grasp_lora.errors import GraspError
from grasp_lora.method.presets import ratio_rule
from grasp_lora.method.rules import surrogate
from grasp_lora.models.adapters import attached, fresh_adapter
from grasp_lora.models.answers import generate, likeliest_labels
from grasp_lora.models.backbone import skeleton, supports_logits_to_keep
from grasp_lora.models.precision import find_dtype, is_quantised
from grasp_lora.recipes.advice import advice
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.stages import AUTO, ControllerStage
from grasp_lora.storage.memory import available_memory, peak_memory
from grasp_lora.text.display import quoted
from grasp_lora.training.settings import TRAINED_AS_MEASURED

FEW_ROUNDS = 10
MANY_ROUNDS = (
    300  # a decision by rule `surrogate` takes 0.2 s after 100 rounds and 1.6 s after 250, about as their cube
)
FEW_INDEPENDENT_ROUNDS = 3  # where no ratio is held, they do not depend on each other
FEW_PROBED = 8
PROMPT_SHOWN = 30  # characters
GIGABYTE = 10**9


def preflight(session: Session) -> list[Finding]:
    """Load and check everything that a run needs and say what to expect; nothing is written.

    Raises:
        GraspError: something does not fit, so that a run would stop.
    """
    check_files(session)
    _check_weights_fit(session)
    check(session)
    recipe, splits, backbone = session.recipe, session.splits, session.backbone
    findings = [_backbone(session)]
    findings += [
        Finding("ok", "adapter", f"{name}: {len(adapter.weights)} modules, ranks {_ranks(adapter.weights.values())}")
        for name, adapter in session.existing_adapters.items()
    ]
    sizes = {name: len(getattr(splits, name)) for name in SPLITS}
    findings.append(Finding("ok", "splits", ", ".join(f"{name} {size}" for name, size in sizes.items())))
    findings.append(
        Finding("ok", "leaks", "no question, context or article is shared with a held-out split, in either language")
    )
    tallies = {"source": splits.report.source, "target": splits.report.target}
    findings += [_counts(side, tally) for side, tally in tallies.items() if tally is not None]
    findings += doubtful(session)
    findings.append(_lengths("train", splits.train))
    findings.append(_label_mask(splits.train[0], backbone.tokenizer))
    if not splits.dev:
        findings.append(
            Finding("warning", "dev", "no dev set: no early stopping, the last step of every fine-tune is kept")
        )
    if recipe.target.on == AUTO and not choosing_splits(sizes):
        text = "too few dev and micro-dev rows choose where the target adapter is trained: it will be on the backbone alone"
        findings.append(Finding("warning", "target.on", text))
    findings += labels(session) if splits.labels else written_answers(session)
    if not splits.test:
        findings.append(Finding("warning", "test", "no test set: nothing will be evaluated"))
    findings += _plan(recipe, sizes)
    keeps_best, has_source_rows = recipe.final.training.keep == "best", bool(splits.source_train)
    said = advice(sizes["dev"], keeps_best=keeps_best, on=recipe.target.on, has_source_rows=has_source_rows)
    findings += [Finding("ok", "advice", sentence) for sentence in said]
    test, groups = splits.test, len(set(group_numbers(splits.test)))
    if width := expected_width(
        list(session.metrics), len(test), len(PLANNED) - 1, group_size(test), groups, len(SEEDS)
    ):
        findings.append(Finding("ok", "power", f"in a comparison of {len(SEEDS)} seeds, {width}"))
    return [*findings, *_measured(session, sizes)]


def _backbone(session: Session) -> Finding:
    backbone = session.backbone
    parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
    text = (
        f"{backbone.name}, {parameters / 1e6:.0f} M weights in {backbone.model.dtype}".replace("torch.", "")
        + f", on {backbone.model.device}, fingerprint {backbone.fingerprint}"
    )
    if not supports_logits_to_keep(backbone.model):
        return Finding(
            "warning", "backbone", f"{text}; it computes logits at every position, which costs time and memory"
        )
    if is_quantised(backbone.model.config):
        return Finding(
            "warning", "backbone", f"{text}; it is quantised: adapters are measured on the quantised weights"
        )
    return Finding("ok", "backbone", text)


def _check_weights_fit(session: Session) -> None:
    """Refuse a backbone that this machine cannot hold before it is loaded, which could end the process without a word."""
    settings = session.backbone_settings
    empty: Any = skeleton(settings)
    if settings.quantise is not None or is_quantised(empty.config):
        return
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    automatic = find_dtype("cuda" if on_gpu else "cpu", empty.config.model_type)
    dtype = automatic if settings.dtype == "auto" else settings.dtype
    weights = sum(parameter.numel() for parameter in empty.parameters())
    needed, free = weights * getattr(torch, dtype).itemsize, available_memory(on_gpu)
    if needed > free:
        raise GraspError(
            f"the weights of {quoted(session.recipe.backbone.name)} need about {needed / GIGABYTE:.2f} GB ({dtype}), and "
            f"{free / GIGABYTE:.2f} GB are free here; set backbone.quantise to nf4, or take another backbone or a larger machine"
        )


class _Clock(Progress):
    """Notes when each optimizer step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def step(self, report: Mapping[str, float]) -> None:
        self.ends.append(time.perf_counter())


def _measured(session: Session, sizes: dict[str, int]) -> list[Finding]:
    """Take two optimizer steps on the longest row and write two answers, and say what the run takes by that.

    The second step and the second answer are timed, since the first ones warm up. Seconds count by tokens: those of a row of
    mean length. What was trained is forgotten.
    """
    recipe, backbone, training = session.recipe, session.backbone, session.recipe.final.training
    train, asked = session.splits.train, session.splits.test or session.splits.train
    longest, clock = max(train, key=_tokens), _Clock()
    quiet = session.variant(recipe.model_copy(update={"report_to": ()}))
    quiet.progress = clock
    rows = [longest] * (2 * training.batch_size * training.accumulation)
    settings = replace(training, epochs=1.0, patience=None, keep="last")
    on_gpu = backbone.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    given = next(iter(session.existing_adapters.values()), None)
    with (
        tempfile.TemporaryDirectory() as folder,
        fresh_adapter(backbone.model, recipe.lora, recipe.seed)
        if given is None
        else attached(backbone.model, given.weights) as model,
    ):
        quiet.finetune(model, rows, (), settings, "check", Path(folder))
        a_row = (clock.ends[1] - clock.ends[0]) * 2 / len(rows) * fmean(map(_tokens, train)) / _tokens(longest)
        for prompt in (asked[-1].prompt_ids, max(asked, key=_tokens).prompt_ids):
            started = time.perf_counter()
            if session.splits.labels:
                likeliest_labels(model, [prompt], session.splits.labels)
            else:
                generate(model, backbone.tokenizer, [prompt], recipe.generation)
            an_answer = time.perf_counter() - started
    trained, probed = _cost(recipe, sizes)
    final, sources = recipe.final, max(1, len(recipe.source.adapters))
    systems = 3 + sources + (recipe.target.on is None) + (final.deliver == "best") + final.all_rows
    seconds = (trained + probed / TRAINED_AS_MEASURED) * a_row + systems * sizes["test"] * an_answer
    where = "of the GPU" if on_gpu else "of this process"
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    said = "cannot be told on this system" if peak is None else f"{peak / GIGABYTE:.1f} GB {where} at the longest row"
    return [
        Finding("ok", "memory", f"measured: {said}"),
        Finding(
            "ok",
            "time",
            f"at most {seconds / 60:.1f} min for the run on this machine, dev losses aside, measured: a training example takes "
            f"{a_row:.3f} s, an answer {an_answer:.2f} s",
        ),
    ]


def _tokens(example: Example) -> int:
    return len(example.prompt_ids) + len(example.completion_ids)


def _counts(side: str, tally: Tally) -> Finding:
    counts = {name: value for name, value in asdict(tally).items() if isinstance(value, int) and value}
    shortest = counts.pop("shortest_tokens", None)
    facts = [f"{name.replace('_', ' ')} {count}" for name, count in counts.items()]
    facts += [f"the shortest has {shortest} tokens"] if shortest else []
    return Finding("ok", side, f"{tally.language}: {', '.join(facts)}")


def _lengths(name: str, examples: Sequence[Example]) -> Finding:
    lengths = sorted(map(_tokens, examples))
    return Finding(
        "ok", "lengths", f"{name}: {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}"
    )


def _label_mask(example: Example, tokenizer: object) -> Finding:
    answer = tokenizer.decode(list(example.completion_ids))  # type: ignore[attr-defined]
    end = example.prompt[-PROMPT_SHOWN:]
    text = f"loss on the answer only, for example {answer!r} of {example.id}, whose prompt ends with {end!r}"
    return Finding("ok", "label mask", text)


def _cost(recipe: Recipe, sizes: dict[str, int]) -> tuple[float, int]:
    """How many examples are trained on and probed at most."""
    trained, probed = 0.0, 0
    if not recipe.source.adapters:
        trained += recipe.source.training.epochs * sizes["source_train"]
    if not recipe.target.adapter:
        chosen = recipe.target.on == AUTO and choosing_splits(sizes)
        trained += (2 if chosen else 1) * recipe.target.training.epochs * sizes["train"]
    runs = 2 if recipe.final.deliver == "best" else 1  # the final run, and the source adapter continued
    trained += runs * recipe.final.training.epochs * sizes["train"]
    if recipe.final.all_rows:
        epochs = recipe.final.training.epochs + (0.0 if recipe.target.adapter else recipe.target.training.epochs)
        trained += epochs * sizes["train"]  # as many steps as before, whatever the rows
    if recipe.final.prune_ratio is None:
        stage = recipe.controller
        trained += stage.training.epochs * sizes["train"]
        pool = sum(sizes[split] for split in stage.rounds.splits)
        probed = expected_rounds(recipe, sizes["train"]) * stage.probed_examples(pool)
    return trained, probed


def _plan(recipe: Recipe, sizes: dict[str, int]) -> list[Finding]:
    rounds = expected_rounds(recipe, sizes["train"])
    findings = []
    if recipe.final.prune_ratio is None:
        stage = recipe.controller
        pool = sum(sizes[split] for split in stage.rounds.splits)
        if pool < FEW_PROBED:
            findings.append(Finding("warning", "probes", f"{pool} examples choose the ratio; 16 are usual"))
        few = FEW_ROUNDS if stage.policy.regime == "held" else FEW_INDEPENDENT_ROUNDS
        level = "warning" if rounds < few else "ok"
        advice = "; raise controller.training.epochs or lower controller.rounds.every" if level == "warning" else ""
        noun = "round" if rounds == 1 else "rounds"
        most = "" if stage.rounds.patience is None and stage.training.patience is None else "at most "
        asked_each_round = stage.policy.regime == "each_step"
        if rounds > MANY_ROUNDS and asked_each_round and ratio_rule(stage.rule) is surrogate:
            level, advice = (
                "warning",
                ", and rule surrogate takes seconds or minutes for each; raise controller.rounds.every",
            )
        findings.append(Finding(level, "rounds", f"the controller will run {most}{rounds} {noun}{advice}"))
        findings += _patience(stage, sizes["train"])
    trained, probed = _cost(recipe, sizes)
    passes = TRAINED_AS_MEASURED * trained + probed
    text = f"at most {trained:.0f} training examples and {probed} probed examples, {passes:.0f} forward passes in all"
    findings.append(Finding("ok", "cost", text))
    return findings


def _patience(stage: ControllerStage, train: int) -> list[Finding]:
    """Warn where a controller run would stop before its probes can tell anything."""
    patience, epoch, every = stage.rounds.patience, stage.training.steps_per_epoch(train), stage.spacing(train)
    if patience is None:
        return []
    if stage.policy.regime == "held" or stage.rounds.start > 0.0:
        text = (
            f"controller.rounds.patience is {patience}, but these rounds are needed to the end of the run; set it to null, or "
            "leave rounds out, which gives what is usual with the preset"
        )
        return [Finding("warning", "patience", text)]
    if patience * every < epoch:
        text = (
            f"the run stops after {patience * every} steps without a lower loss, less than an epoch ({epoch} steps); leave "
            f"controller.rounds.every out for a round after each epoch, or set controller.rounds.patience to "
            f"{math.ceil(epoch / every)}"
        )
        return [Finding("warning", "patience", text)]
    return []


def _ranks(pairs: object) -> str:
    return ", ".join(map(str, sorted({pair.rank for pair in pairs})))  # type: ignore[attr-defined]

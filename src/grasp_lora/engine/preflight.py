"""What will happen before it happens: the lines of `grasp-lora check`.

First what a run would refuse is refused, as a run does it. Then come facts (`ok`) and what can be meant, but seldom is
(`warning`). Last, a few training steps and answers on the user's own rows say how long and how large the job will be.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from statistics import fmean
from typing import Any

import torch

from grasp_lora.data.doubts import beside_context, likely_slips, untranslated, with_two_labels
from grasp_lora.data.encode import Example, Tally
from grasp_lora.data.splits import SPLITS, group_numbers, group_size, read_shares
from grasp_lora.data.tasks import task_fields
from grasp_lora.engine.check import check
from grasp_lora.engine.comparison import expected_width
from grasp_lora.engine.plan import planned
from grasp_lora.engine.session import Session
from grasp_lora.models.adapters import attached, fresh_adapter
from grasp_lora.models.backbone import is_quantised, supports_logits_to_keep, without_peft
from grasp_lora.models.generation import answer
from grasp_lora.models.loss import collate, example_losses
from grasp_lora.storage.memory import enough_memory, peak_memory
from grasp_lora.text.characters import are_glued
from grasp_lora.text.display import listed, one_line
from grasp_lora.training.training_settings import TRAINED_AS_MEASURED

FEW_ROUNDS = 10
FEW_INDEPENDENT_ROUNDS = 3  # where no ratio is held, they do not depend on each other
FEW_PROBED = 8
PROMPT_SHOWN = 30  # characters
LESS_MEMORY = (
    "set backbone.gradient_checkpointing to true if it is not, take a smaller backbone, or lower data.max_tokens"
)
TIMED = 2  # answers
GIGABYTE = 1e9


@dataclass(frozen=True)
class Finding:
    """One line of the preflight."""

    level: str  # `ok` or `warning`
    topic: str
    text: str


def preflight(session: Session) -> Iterator[Finding]:
    """Load and check everything that a run needs; then say what to expect, line by line as it is found. Nothing is written.

    Raises:
        GraspError: something does not fit, so that a run would stop.
    """
    check(session)
    answers = _labels if session.splits.labels else _written_answers
    return chain.from_iterable(lines(session) for lines in (_inputs, _doubts, answers, _plan, _measured))


def _ok(topic: str, text: str) -> Finding:
    return Finding("ok", topic, text)


def _warning(topic: str, text: str) -> Finding:
    return Finding("warning", topic, text)


def _inputs(session: Session) -> Iterator[Finding]:
    """What was loaded: backbone, adapters, rows, one example of what is learned."""
    splits, backbone = session.splits, session.backbone
    parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
    dtype = str(backbone.model.dtype).removeprefix("torch.")
    text = f"{backbone.name}, {parameters / 1e6:.0f} M weights in {dtype}, on {backbone.model.device}"
    if not supports_logits_to_keep(backbone.model):
        yield _warning("backbone", f"{text}; it computes logits at every position, which costs time and memory")
    elif is_quantised(backbone.model.config):
        yield _warning("backbone", f"{text}; it is quantised: adapters are measured on the quantised weights")
    else:
        yield _ok("backbone", text)
    for name, adapter in session.given.items():
        ranks = ", ".join(map(str, sorted({pair.rank for pair in adapter.weights.values()})))
        yield _ok("adapter", f"{name}: {len(adapter.weights)} modules, ranks {ranks}")
    yield _ok("splits", ", ".join(f"{name} {len(getattr(splits, name))}" for name in SPLITS))
    yield _ok("leaks", "no id, text or article is shared with a held-out split, in either language")
    for side, tally in (("source", splits.report.source), ("target", splits.report.target)):
        if tally is not None:
            yield _ok(side, f"{tally.language}: {_counts(tally)}")
    lengths = sorted(map(_tokens, splits.train))
    yield _ok("lengths", f"train: {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}")
    first = splits.train[0]
    answer, end = backbone.tokenizer.decode(list(first.completion_ids)), first.prompt[-PROMPT_SHOWN:]
    text = f"loss on the answer only, for example {answer!r} of {first.where}, whose prompt ends with {end!r}"
    yield _ok("label mask", text)


def _counts(tally: Tally) -> str:
    counts = {name: value for name, value in asdict(tally).items() if isinstance(value, int) and value}
    shortest = counts.pop("shortest_tokens", None)
    facts = [f"{name.replace('_', ' ')} {count}" for name, count in counts.items()]
    return ", ".join(facts + ([f"the shortest has {shortest} tokens"] if shortest else []))


def _doubts(session: Session) -> Iterator[Finding]:
    """What can be meant, but seldom is."""
    recipe, splits = session.recipe, session.splits
    yield from _doubts_of_rows(session)
    for name, metric in session.metrics.items():
        if lacking := metric.lacking(session.language):
            hint = "; name one in bertscore.models" if name == "bertscore" else ""
            yield _warning("metrics", f"{name} has {lacking}, so it will be unavailable{hint}")
    if recipe.source.adapters and recipe.data.source is not None:
        yield _warning("source", "source.adapters are given, so no source adapter is trained on data.source")
    elif recipe.data.source is not None and recipe.data.source.language.lower() == session.language.lower():
        text = f"source and target are both in {session.language}; data.source is meant for a language with more data"
        yield _warning("source", text)
    if not splits.test:
        yield _warning("test", "no test set: nothing will be evaluated")


def _doubts_of_rows(session: Session) -> Iterator[Finding]:
    """Rows that stand twice, that may not belong there, or whose prompt and answer are glued together."""
    splits = session.splits
    tallies = [tally for tally in (splits.report.source, splits.report.target) if tally is not None]
    excluded, numbers = sum(tally.excluded_for_leak for tally in tallies), splits.report.numbers_as_ids
    if numbers and excluded:
        yield _warning(
            "ids",
            f"{numbers} ids are whole numbers that stand in several files, so they count as the same questions, and examples "
            f"were left out ({excluded} in all); where ids only number the rows, rename that column",
        )
    repeated = {name: _repeated(getattr(splits, name)) for name in ("train", "dev", "micro_dev", "test")}
    if any(repeated.values()):
        where = ", ".join(
            f"{len(pairs)} of {name} (such as {pairs[0][0].where} and {pairs[0][1].where})"
            for name, pairs in repeated.items()
            if pairs
        )
        text = f"examples that stand there more than once, prompt and answer alike: {where}; remove them from the data"
        yield _warning("duplicates", text)
    yield from _strange_rows(session)
    glued = [row for row in splits.train if are_glued(row.prompt, row.completion)]
    if not splits.report.chat_template and 2 * len(glued) > len(splits.train):
        border = one_line(glued[0].prompt[-8:] + glued[0].completion[:8])
        yield _warning(
            "prompt",
            f"nothing stands between prompts and answers, such as {border!r}; end the prompts with a space or a line break, "
            f"or write under data: prompt: {json.dumps(splits.report.prompt + chr(10), ensure_ascii=False)}",
        )


def _strange_rows(session: Session) -> Iterator[Finding]:
    """Rows of the target's files, in no split or any, that may not belong there."""
    data, base = session.recipe.data, session.base
    corpora = {"target": data.target} | ({"source": data.source} if data.source else {})
    records = {
        role: [record for share in read_shares(data, corpus, role, base) for record in share.pool.records]
        for role, corpus in corpora.items()
    }
    target = records["target"]
    strange = {
        "have an answer that does not stand in the context": beside_context(target) if data.task == "qa" else [],
        # Of a translation both languages have the texts to translate in common.
        "stand in the source word for word": untranslated(target, records.get("source", []))
        if data.task != "translation"
        else [],
    }
    for fault, rows in strange.items():
        if rows:
            first = min((record.where for record in rows), key=_in_order)
            yield _warning(
                "rows", f"{len(rows)} of {len(target)} target rows {fault}, first {first}; correct or remove them"
            )
    for line in with_two_labels(target) if task_fields(data.task).chooses else ():
        yield _warning("labels", line)


def _in_order(where: str) -> tuple[int, str]:
    """Sorts places of one file by their numbers: line 9 before line 10."""
    return len(where), where


def _repeated(rows: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Each row of which an equal one, prompt and answer alike, stands before, after that one."""
    first: dict[tuple[str, str], Example] = {}
    in_order = sorted(rows, key=lambda row: _in_order(row.where))
    pairs = [(first.setdefault((row.prompt, row.completion), row), row) for row in in_order]
    return [(earlier, row) for earlier, row in pairs if earlier is not row]


def _labels(session: Session) -> Iterator[Finding]:
    """What can be chosen, what choosing the same label always would be worth, and labels that are rare or missing."""
    splits = session.splits
    counts = splits.report.labels or {}
    names = [name for name in ("train", "dev", "micro_dev", "test") if getattr(splits, name)]
    by_label = {label: [by_split[name] for name in names] for label, by_split in counts.items()}
    listing = ", ".join(f"{label} {' + '.join(map(str, numbers))}" for label, numbers in by_label.items())
    text = f"{len(counts)}, how often each stands in {' + '.join(names)}: {listing}"
    if splits.test:
        most = max(counts, key=lambda label: counts[label]["train"])
        share = 100 * counts[most]["test"] / len(splits.test)
        text += f"; to answer the most frequent one, {most}, always has accuracy {share:.1f} on the test"
    yield _ok("labels", text)
    for label in (label for label, numbers in by_label.items() if not any(numbers)):
        text = f"no row of the target has {label}; add rows, or delete it from data.labels"
        yield _warning("labels", text)
    target_rows = (row for name in names for row in getattr(splits, name))
    slips = likely_slips((row.references[0], row.where) for row in target_rows)
    for question in slips.values():
        text = f"{question} If so, correct it there, and delete it from data.labels"
        yield _warning("labels", text)
    rare = []
    for label, numbers in by_label.items():
        # A micro-dev set is small on purpose.
        lacking = [name for name, number in zip(names, numbers, strict=True) if not number and name != "micro_dev"]
        if lacking and any(numbers) and label not in slips:
            rare.append(f"{label} ({sum(numbers)} in all, none in {listed(lacking)})")
    if rare:
        text = f"too few rows for every split: {listed(rare)}; add rows"
        yield _warning("labels", text)
    foreign = {row.references[0] for row in (*splits.source_train, *splits.source_dev)} - counts.keys()
    if foreign:
        names = sorted(foreign)
        text = (
            f"the source has labels that the target has not, {listed(names)}; if they mean the same, write them alike"
        )
        yield _warning("labels", text)


def _written_answers(session: Session) -> Iterator[Finding]:
    """Warn of written answers that cannot be whole."""
    test, generation = session.splits.test, session.recipe.generation
    if cut := [stop for stop in generation.stop if any(all(stop in text for text in row.references) for row in test)]:
        text = f"generation.stop {cut} ends answers that test references go on after; their scores cannot be full"
        yield _warning("stop", f"{text}; set generation.stop to []")
    lengths = [len(row.completion_ids) - 1 for row in test]  # the end of text is a token that scores do not need
    if longer := sum(length > generation.max_new_tokens for length in lengths):
        yield _warning(
            "answers",
            f"{longer} of {len(test)} test answers have more than generation.max_new_tokens {generation.max_new_tokens} tokens, "
            f"so their scores cannot be full; the longest has {max(lengths)}",
        )


def _plan(session: Session) -> Iterator[Finding]:
    """Rounds, cost, and what a test set of this size can tell."""
    recipe, splits = session.recipe, session.splits
    if recipe.final.prune_ratio is None:
        stage, pool = recipe.controller, len(session.probe_pool)
        rounds = len(stage.round_steps(len(splits.train)))
        if pool < FEW_PROBED:
            yield _warning("probes", f"{pool} examples choose the ratio; 16 are usual")
        few = rounds < (FEW_ROUNDS if stage.policy.regime == "held" else FEW_INDEPENDENT_ROUNDS)
        most = "" if stage.rounds.patience is None and stage.training.patience is None else "at most "
        text = f"the controller will run {most}{rounds} round{'' if rounds == 1 else 's'}"
        hint = "; raise controller.training.epochs or lower controller.rounds.every"
        yield _warning("rounds", text + hint) if few else _ok("rounds", text)
    plan = planned(session)
    trained, probed = sum(plan.trained.values()), plan.probed
    passes = TRAINED_AS_MEASURED * trained + probed
    text = f"at most {trained} training examples and {probed} probed ones, {passes} forward passes"
    yield _ok("cost", f"{text}; dev losses and answers come on top")
    test = splits.test
    width = expected_width(
        list(session.metrics), len(test), plan.systems - 1, group_size(test), len(set(group_numbers(test))), seeds=1
    )
    if width:
        yield _ok("power", f"in the report of the run, {width}")


@contextmanager
def _checkpointing(model: torch.nn.Module) -> Iterator[None]:
    """As the trainings do it."""
    from grasp_lora.training.trainer import leaving_backbone_as_it_was

    with leaving_backbone_as_it_was(model):
        without_peft(model).activation_checkpointing_enable()
        model.train()
        yield


def _tokens(row: Example) -> int:
    return len(row.prompt_ids) + len(row.completion_ids)


def _measured(session: Session) -> list[Finding]:
    """Train on the longest row and on one of mean length, answer two prompts, forget it all, and reckon the job from that."""
    recipe, splits, model = session.recipe, session.splits, session.backbone.model
    rows = sorted(splits.train, key=_tokens)
    mean, many = fmean(map(_tokens, rows)), recipe.final.training.batch_size
    middle = next(row for row in rows if _tokens(row) >= mean)  # the median is too short where few rows are long
    given = next(iter(session.given.values()), None)
    with (
        enough_memory("one training step", LESS_MEMORY),
        fresh_adapter(model, recipe.lora, recipe.seed_of("check"))
        if given is None
        else attached(model, given.weights) as adapted,  # whose modules need not be those of the recipe
    ):
        device, label_positions = next(adapted.parameters()).device, supports_logits_to_keep(adapted)

        def seconds(row: Example, learns: bool) -> float:
            batch = {name: part.to(device) for name, part in collate([row] * many, session.pad_id).items()}
            started = time.perf_counter()
            with torch.set_grad_enabled(learns):
                loss: Any = example_losses(adapted, batch, label_positions=label_positions).mean()
                if learns:
                    loss.backward()
            loss.item()  # waits for a GPU
            return (time.perf_counter() - started) / many

        with _checkpointing(adapted) if recipe.backbone.gradient_checkpointing else nullcontext():
            seconds(rows[-1], True)  # whose memory counts; the first step is slow in any case
            trained, measured, answered = seconds(middle, True), seconds(middle, False), 0.0
        if splits.test:
            started = time.perf_counter()
            few, tokenizer = splits.test[:TIMED], session.backbone.tokenizer
            prompts, right = [row.prompt_ids for row in few], [row.completion_ids for row in few]
            answer(adapted, tokenizer, prompts, recipe.generation, labels=splits.labels, right=right)
            answered = (time.perf_counter() - started) / len(few)
    plan = planned(session)
    # Dev losses are measured once an epoch.
    trained_rows = sum(plan.trained.values())
    source = plan.trained.get("source", 0)
    looks = source / max(1, len(splits.source_train)) * len(splits.source_dev)
    looks += (trained_rows - source) / len(splits.train) * len(splits.dev)
    total = trained_rows * trained + (plan.probed + looks) * measured + plan.systems * len(splits.test) * answered
    on_gpu = model.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    size = (
        "not told by this system"
        if peak is None
        else f"{peak / GIGABYTE:.1f} GB {'on the GPU' if on_gpu else 'in all'}"
    )
    minutes = max(1, math.ceil(total / 60))
    text = f"about {minutes} min here: a training example takes {trained:.2f} s, an answer {answered:.2f} s"
    return [_ok("time", text), _ok("memory", size)]

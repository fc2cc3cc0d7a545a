"""What will happen before it happens: the lines of `grasp-lora check`.

First what a run would refuse is refused, as a run does it. Then come facts (`ok`) and what can be meant, but seldom is
(`warning`). Last, two training steps and two answers on the user's own rows say how long and how large the job will be.
"""

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import torch

from grasp_lora.data.encode import Example, Tally
from grasp_lora.data.splits import SPLITS, group_numbers, group_size
from grasp_lora.engine.check import check, check_files
from grasp_lora.engine.comparison import PLANNED, SEEDS, expected_width
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import choosing_splits
from grasp_lora.evaluation.answers import taken_for_one
from grasp_lora.models.adapters import fresh_adapter
from grasp_lora.models.answers import generate
from grasp_lora.models.backbone import supports_logits_to_keep
from grasp_lora.models.precision import is_quantised
from grasp_lora.recipes.advice import advice
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.stages import AUTO, ControllerStage
from grasp_lora.storage.memory import enough_memory
from grasp_lora.text.characters import ENDS_OF_SENTENCES, bare_words, split_unspaced
from grasp_lora.text.display import listed, one_line, quoted
from grasp_lora.text.languages import language_code
from grasp_lora.training.loss import collate, example_losses
from grasp_lora.training.settings import TRAINED_AS_MEASURED

FEW_ROUNDS = 10
FEW_INDEPENDENT_ROUNDS = 3  # where no ratio is held, they do not depend on each other
FEW_PROBED = 8
PROMPT_SHOWN = 30  # characters
FEW_OF_A_LABEL = 3  # rows of the target, in all its splits
TIMED = 2  # training steps and answers
GIGABYTE = 1e9


@dataclass(frozen=True)
class Finding:
    """One line of the preflight: `ok` or `warning`, a topic and what was found."""

    level: str
    topic: str
    text: str


def preflight(session: Session) -> list[Finding]:
    """Load and check everything that a run needs and say what to expect; nothing is written.

    Raises:
        GraspError: something does not fit, so that a run would stop.
    """
    check_files(session)
    check(session)
    recipe, splits, backbone = session.recipe, session.splits, session.backbone
    findings = [_backbone(session)]
    findings += [
        Finding("ok", "adapter", f"{name}: {len(adapter.weights)} modules, ranks {_ranks(adapter.weights.values())}")
        for name, adapter in session.given.items()
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


def _counts(side: str, tally: Tally) -> Finding:
    counts = {name: value for name, value in asdict(tally).items() if isinstance(value, int) and value}
    shortest = counts.pop("shortest_tokens", None)
    facts = [f"{name.replace('_', ' ')} {count}" for name, count in counts.items()]
    facts += [f"the shortest has {shortest} tokens"] if shortest else []
    return Finding("ok", side, f"{tally.language}: {', '.join(facts)}")


def _lengths(name: str, examples: Sequence[Example]) -> Finding:
    lengths = sorted(len(example.prompt_ids) + len(example.completion_ids) for example in examples)
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
        probed = len(stage.round_steps(sizes["train"])) * stage.probed_examples(pool)
    return trained, probed


def _plan(recipe: Recipe, sizes: dict[str, int]) -> list[Finding]:
    rounds = len(recipe.controller.round_steps(sizes["train"]))
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


def _measured(session: Session, sizes: dict[str, int]) -> list[Finding]:
    """Take two training steps and two answers on the longest rows, forget what they came to, and reckon the job from them."""
    recipe, splits, model = session.recipe, session.splits, session.backbone.model
    rows = sorted(splits.train, key=lambda row: len(row.prompt_ids) + len(row.completion_ids))
    middle, many = rows[len(rows) // 2], recipe.final.training.batch_size
    with (
        enough_memory("one training step", "take a smaller backbone, or lower data.max_tokens"),
        fresh_adapter(model, recipe.lora, recipe.seed) as adapted,
    ):
        device, label_positions = next(adapted.parameters()).device, supports_logits_to_keep(adapted)

        def step(row: Example, learns: bool) -> float:
            batch = {name: part.to(device) for name, part in collate([row] * many, session.pad_id).items()}
            started = time.perf_counter()
            with torch.set_grad_enabled(learns):
                loss = example_losses(adapted, batch, label_positions=label_positions).mean()
                if learns:
                    loss.backward()
            loss.item()  # waits for a GPU
            return (time.perf_counter() - started) / many

        step(rows[-1], True)  # the longest row, whose memory counts
        trained, measured = step(middle, True), step(middle, False)
        answered = 0.0
        if splits.test and not splits.labels:
            started = time.perf_counter()
            prompts = [row.prompt_ids for row in splits.test[:TIMED]]
            generate(adapted, session.backbone.tokenizer, prompts, recipe.generation)
            answered = (time.perf_counter() - started) / len(prompts)
    training_rows, probed = _cost(recipe, sizes)
    systems = 5  # source, merge, continued, GRASP's result and the backbone alone
    seconds = training_rows * trained + probed * measured + systems * (sizes["test"] * (answered + measured))
    on_gpu = model.device.type == "cuda"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return [
        Finding(
            "ok",
            "time",
            f"at most about {max(1, math.ceil(seconds / 60))} min here: a training example takes {trained:.2f} s, an answer "
            f"{answered:.2f} s",
        ),
        Finding("ok", "memory", f"{peak / GIGABYTE:.1f} GB {'on the GPU' if on_gpu else 'in all'} for the longest row"),
    ]


def doubtful(session: Session) -> list[Finding]:
    """Warn of what can be meant, but seldom is."""
    recipe, splits = session.recipe, session.splits
    found = []
    tallies = [tally for tally in (splits.report.source, splits.report.target) if tally is not None]
    numbers, excluded = splits.report.numbers_as_ids, sum(tally.excluded_for_leak for tally in tallies)
    if numbers and excluded:
        text = (
            f"{numbers} ids are whole numbers that stand in source and target, so they count as the same questions, and source "
            f"examples were left out ({excluded} in all); where ids only number the rows, rename that column"
        )
        found.append(Finding("warning", "ids", text))
    repeated = {name: _repeated(getattr(splits, name)) for name in ("train", "dev", "micro_dev", "test")}
    if any(repeated.values()):
        where = ", ".join(f"{len(own)} of {name} (such as {own[0].public_id})" for name, own in repeated.items() if own)
        text = f"examples that stand there more than once, prompt and answer alike: {where}; remove them from the data"
        found.append(Finding("warning", "duplicates", text))
    found += [*_contradictions(session), *_other_references(session), *_nearly_leaked(session)]
    if spelled := sum(tally.control_tokens_kept_as_text for tally in tallies):
        text = (
            f"{spelled} examples spell control tokens, such as the end of a turn, which stay text; for conversations give "
            "messages to a backbone with a chat template, or write the tokens into data.prompt and data.completion"
        )
        found.append(Finding("warning", "control tokens", text))
    talks = sum(tally.conversations for tally in tallies)
    template = getattr(session.backbone.tokenizer, "chat_template", None)
    if talks and template and not splits.report.chat_template:
        text = (
            "the data are conversations and the backbone has a chat template, but data.chat_template is false, so the "
            "messages before the answer are joined as plain text; leave it out"
        )
        found.append(Finding("warning", "chat", text))
    glued = [example for example in splits.train if _are_glued(example)]
    if not splits.report.chat_template and 2 * len(glued) > len(splits.train):
        border = one_line(glued[0].prompt[-8:] + glued[0].completion[:8])
        text = (
            f"nothing stands between prompts and answers, such as {border!r}; end the prompts with a space or a line break, "
            "or set data.prompt"
        )
        found.append(Finding("warning", "prompt", text))
    for name, metric in session.metrics.items():
        if lacking := metric.lacking(session.language):
            advice = "; name one in bertscore.models" if name == "bertscore" else ""
            text = f"{name} has {lacking}, so it will be unavailable{advice}"
            found.append(Finding("warning", "metrics", text))
    if recipe.source.adapters and recipe.data.source is not None:
        text = "source.adapters are given, so no source adapter is trained on data.source"
        found.append(Finding("warning", "source", text))
    elif recipe.data.source is not None and recipe.data.source.language.lower() == session.language.lower():
        text = f"source and target are both in {session.language}; data.source is meant for a language with more data"
        found.append(Finding("warning", "source", text))
    tasks = {place: one.info.answers and one.info.answers.task for place, one in session.given.items()}
    if others := sorted(f"{place} ({task})" for place, task in tasks.items() if task not in (None, recipe.data.task)):
        text = (
            f"the recipe's task is {recipe.data.task}, but these adapters were trained for another: {', '.join(others)}"
        )
        found.append(Finding("warning", "adapter", text))
    parents = [adapter.sha256 for adapter in session.given.values()]
    given = len(recipe.source.adapters) + (recipe.target.adapter is not None)
    if len(set(parents)) < given:
        text = "the same adapter is given more than once, so it is merged with itself"
        found.append(Finding("warning", "adapter", text))
    return found


def _repeated(examples: Sequence[Example]) -> list[Example]:
    """The examples of which an equal one, prompt and answer alike, stands before."""
    first: dict[tuple[str, str], Example] = {}
    return [one for one in examples if first.setdefault((one.prompt, one.completion), one) is not one]


def _contradictions(session: Session) -> list[Finding]:
    """Warn of questions or texts that stand there with two answers."""
    if session.recipe.data.task not in ("qa", "classification"):
        return []
    splits = session.splits
    answers: dict[str, dict[str, str]] = {}
    for example in (*splits.train, *splits.dev, *splits.micro_dev, *splits.test):
        answers.setdefault(example.prompt, {}).setdefault(example.completion, example.public_id)
    several = [found for found in answers.values() if len(found) > 1]
    if not several:
        return []
    first = " and ".join(f"{quoted(answer)} ({place})" for answer, place in sorted(several[0].items())[:2])
    many = "1 prompt stands" if len(several) == 1 else f"{len(several)} prompts stand"
    text = (
        f"{many} there with different answers, {'' if len(several) == 1 else 'one of them '}with {first}; where they contradict "
        "each other, correct the data"
    )
    return [Finding("warning", "contradictions", text)]


def _other_references(session: Session) -> list[Finding]:
    """Warn of test references that no answer to learn is among, as where the column holds a bibliography."""
    test = session.splits.test
    apart = [one for one in test if not any(reference.strip() in one.completion for reference in one.references)]
    if session.splits.labels or 2 * len(apart) <= len(test):
        return []
    learned, scored = apart[0].completion.strip(), apart[0].references[0]
    text = (
        f"{len(apart)} of {len(test)} test rows have an answer that is none of their references, such as {quoted(learned)} and "
        f"{quoted(scored)}: the first is what is learned, the second what scores; where the column references holds something "
        "else, rename it"
    )
    return [Finding("warning", "references", text)]


def _nearly_leaked(session: Session) -> list[Finding]:
    """Warn of test rows that another split has in other case or with other marks, which no rule keeps apart."""
    splits = session.splits
    test = [(tuple(bare_words(example.prompt)), example.public_id) for example in splits.test]
    wanted = {words for words, _ in test}
    others = chain(splits.train, splits.dev, splits.micro_dev, splits.source_train) if test else ()
    seen = {words for example in others if (words := tuple(bare_words(example.prompt))) in wanted}
    known = [name for words, name in test if words in seen]
    if not known:
        return []
    text = (
        f"{len(known)} of {len(test)} test prompts stand in another split but for case and marks around words, the first is "
        f"{known[0]}; remove those that ask the same"
    )
    return [Finding("warning", "near leaks", text)]


def _are_glued(example: Example) -> bool:
    """Whether the last word or sentence of a prompt goes on as the first word of its answer."""
    border = example.prompt[-1:] + example.completion[:1]
    ends = border[:1].isalnum() or border[:1] in ENDS_OF_SENTENCES
    return len(border) == 2 and ends and border[1].isalnum() and split_unspaced(border).strip() == border


def labels(session: Session) -> list[Finding]:
    """Say what can be chosen, and what choosing the same label always would be worth."""
    splits = session.splits
    counts = splits.report.labels or {}
    there = [name for name in ("train", "dev", "micro_dev", "test") if getattr(splits, name)]
    listing = ", ".join(f"{label} {' + '.join(str(found[name]) for name in there)}" for label, found in counts.items())
    text = f"{len(counts)}, how often each stands in {' + '.join(there)}: {listing}"
    if splits.test:
        most = max(counts, key=lambda label: counts[label]["train"])
        share = 100 * counts[most]["test"] / len(splits.test)
        text += f"; to answer the most frequent one, {most}, always has accuracy {share:.1f} on the test"
    found = [Finding("ok", "labels", text)]
    if missing := [label for label, of in counts.items() if not of["train"]]:
        found.append(Finding("warning", "labels", f"no training row has {listed(missing)}; add rows, or remove it"))
    rare = {label: sum(of[name] for name in there) for label, of in counts.items()}
    if rare := {label: count for label, count in rare.items() if 0 < count < FEW_OF_A_LABEL}:
        told = listed([f"{label} ({count})" for label, count in rare.items()])
        advice = "where one is a slip of another label, correct it; else add rows"
        found.append(Finding("warning", "labels", f"so few rows of the target have the label {told}; {advice}"))
    others = {example.references[0] for example in (*splits.source_train, *splits.source_dev)} - counts.keys()
    if others:
        names = listed(sorted(others))
        text = f"the source has labels that the target has not, {names}; if they mean the same, write them alike in both files"
        found.append(Finding("warning", "labels", text))
    return found


def written_answers(session: Session) -> list[Finding]:
    """Warn of written answers that cannot be whole."""
    test, generation = session.splits.test, session.recipe.generation
    found = _answers_too_long(test, generation.max_new_tokens)
    if cut := [stop for stop in generation.stop if _cuts_all_references(test, stop)]:
        text = f"generation.stop {cut} ends answers that test references go on after; their scores cannot be full"
        found.insert(0, Finding("warning", "stop", f"{text}; set generation.stop to []"))
    return [*found, *_answers_alike(session)]


def _answers_alike(session: Session) -> list[Finding]:
    """Warn of a metric that was made for questions, where answers are something else, such as numbers or code."""
    if session.recipe.data.task != "completion" or "exact_match" not in session.metrics:
        return []
    answers = (example.references[0] for example in session.splits.test)
    pair = taken_for_one(answers, language_code(session.language))
    if pair is None:
        return []
    one, other = map(quoted, pair)
    text = f"exact_match drops marks and articles, so it takes {one} and {other} for the same answer"
    if not pair[0]:
        text = f"exact_match drops marks and articles, so it takes {other} for an empty answer"
    return [Finding("warning", "metrics", f"{text}; set metrics to others, or to one of your own")]


def _answers_too_long(test: Sequence[Example], most: int) -> list[Finding]:
    """Warn of answers that end before they are whole. The end of text is a token, too, but not one that scores need."""
    lengths = [len(example.completion_ids) - 1 for example in test]
    longer = sum(length > most for length in lengths)
    if not longer:
        return []
    text = (
        f"{longer} of {len(test)} test answers have more than generation.max_new_tokens {most} tokens, so their scores cannot "
        f"be full; the longest has {max(lengths)}"
    )
    return [Finding("warning", "answers", text)]


def _cuts_all_references(test: Sequence[Example], stop: str) -> bool:
    """Whether some test example has no reference that an answer ended by this text could equal."""
    return any(all(stop in reference for reference in example.references) for example in test)

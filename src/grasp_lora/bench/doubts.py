"""What in data and recipe can be meant, but seldom is, as lines of `grasp-lora check`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from grasp_lora.bench.session import Session
from grasp_lora.data.encode import Example
from grasp_lora.evaluation.answers import taken_for_one
from grasp_lora.text.characters import ENDS_OF_SENTENCES, bare_words, split_unspaced
from grasp_lora.text.display import listed, one_line, quoted
from grasp_lora.text.languages import language_code

FEW_OF_A_LABEL = 3  # rows of the target, in all its splits


@dataclass(frozen=True)
class Finding:
    """One line of the preflight: `ok` or `warning`, a topic and what was found."""

    level: str
    topic: str
    text: str


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
    tasks = {place: one.info.answers and one.info.answers.task for place, one in session.existing_adapters.items()}
    if others := sorted(f"{place} ({task})" for place, task in tasks.items() if task not in (None, recipe.data.task)):
        text = (
            f"the recipe's task is {recipe.data.task}, but these adapters were trained for another: {', '.join(others)}"
        )
        found.append(Finding("warning", "adapter", text))
    parents = [adapter.sha256 for adapter in session.existing_adapters.values()]
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

"""Which of several adapters: all of them, and the backbone itself, on one file of rows. There is no recipe and no training.

    judgement = judge(["runs/sw/adapter", "someone/swahili-qa", "backbone"], "test.csv", language="sw")
    sentence(judgement)  # report/judged.py: 'someone/swahili-qa has the highest F1, 61.2; no difference is shown to ...'

The backbone is loaded once. Each adapter is asked in the form that it was trained with; one that does not say takes the form of
the first that does. Rows that belong together are drawn together, and the intervals hold for all pairs at once.
"""

import copy
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from grasp_lora.data.encode import Encoder, Example, Tally, check_tokenizer, encode_labels
from grasp_lora.data.files import resolve_file
from grasp_lora.data.groups import join_groups, keys_with_turns
from grasp_lora.data.records import check_labels
from grasp_lora.data.tasks import FALLBACK_LANGUAGE, built_in_template, resolve_template, task_fields
from grasp_lora.engine.progress import Progress
from grasp_lora.engine.results import TEST_LOSS, Prediction, main_metric
from grasp_lora.errors import AdapterError, DataError
from grasp_lora.evaluation.metrics import METRICS, score
from grasp_lora.evaluation.statistics import PairedComparison, compare_all_pairs
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.models.adapter_files import Answers, LoadedAdapter, read_adapter
from grasp_lora.models.adapters import attached, check_fits
from grasp_lora.models.backbone import Backbone, backbone_of
from grasp_lora.models.generation import answer
from grasp_lora.models.model_settings import GenerationSettings
from grasp_lora.recipes.corpus import Corpus, read_corpus
from grasp_lora.recipes.load import backbone_of_run
from grasp_lora.storage.reading import expanded, is_folder
from grasp_lora.text.display import quoted

logger = logging.getLogger(__name__)

BACKBONE = "backbone"  # in the place of an adapter: the backbone alone


@dataclass(frozen=True)
class Contestant:
    """Who answers.

    Args:
        name: for tables: the adapter's own, or its place where two are called alike.
        weights: None for the backbone alone.
        form: how it was trained to be asked; `task` is None where it does not say.
        chat_template: that it brings along, or None.
        rows: hashes of what its training rows asked.
    """

    name: str
    weights: AdapterWeights | None = None
    form: Answers = field(default_factory=Answers)
    chat_template: str | None = None
    rows: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Pair:
    """Two contestants: the first minus the second, by one score."""

    first: str
    second: str
    score: str
    comparison: PairedComparison


@dataclass(frozen=True)
class Judgement:
    """Which adapter is best on the rows, and how sure that is.

    Args:
        backbone: its name.
        file: that of the rows.
        language, task: of the rows.
        groups: how many groups of what belongs together the rows form.
        prompts: of each row, as the first contestant was asked.
        answers: of each contestant, its answer to each row with loss and scores.
        scores: of each contestant, the mean loss (`test_loss`, nats per answer token) and each metric; None: not available here.
        signatures: how each metric was computed.
        pairs: every pair of contestants by every score that has an interval.
    """

    backbone: str
    file: str
    language: str
    task: str
    groups: int
    prompts: tuple[str, ...]
    answers: Mapping[str, Sequence[Prediction]]
    scores: Mapping[str, Mapping[str, float | None]]
    signatures: Mapping[str, str]
    pairs: tuple[Pair, ...]

    @property
    def examples(self) -> int:
        """How many rows there are."""
        return len(self.prompts)

    @property
    def metric(self) -> str:
        """The score that ranks: the main one of the task."""
        return main_metric(list(self.signatures))

    @property
    def ranking(self) -> list[str]:
        """The contestants, the best first; of equal ones the first that was named."""
        return sorted(self.scores, key=lambda name: -(self.scores[name][self.metric] or 0.0))

    def against(self, name: str, other: str, score: str | None = None) -> PairedComparison | None:
        """One contestant minus another by a score (None: that which ranks); None where there is no interval."""
        wanted = self.metric if score is None else score
        for pair in self.pairs:
            if pair.score == wanted and {pair.first, pair.second} == {name, other}:
                return pair.comparison if pair.first == name else turned(pair.comparison)
        return None

    def to_json(self) -> dict[str, Any]:
        """Return it as judge.json holds it, the answers aside."""
        facts = {key: value for key, value in asdict(self).items() if key not in ("answers", "prompts")}
        return facts | {"examples": self.examples, "metric": self.metric, "ranking": self.ranking}


def turned(comparison: PairedComparison) -> PairedComparison:
    """Return the same pair the other way round."""
    return replace(
        comparison, difference=0.0 - comparison.difference, low=0.0 - comparison.high, high=0.0 - comparison.low
    )


def judge(
    adapters: Sequence[str | Path],
    rows: str | Path,
    language: str,
    *,
    columns: Mapping[str, str] | None = None,
    sheet: str | None = None,
    chat: bool | None = None,
    backbone: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> Judgement:
    """Measure adapters on the rows of a file: losses, answers, scores, and paired intervals between all of them.

    Args:
        adapters: PEFT adapters of one backbone, folders or hub ids; `backbone` is the backbone alone, and comes by itself where
            there is one adapter.
        rows: a file of rows with answers, in any layout that a recipe's data may have; none of the adapters was trained on them.
        language: code of the rows, such as `sw`.
        columns: field -> column of the rows, where they differ.
        sheet: of a workbook.
        chat: whether prompts stand in the chat template; None: as each adapter was trained, else where rows are conversations.
        backbone, revision, trust_remote_code: as in a recipe's `backbone`; None takes the one that the first adapter names.
        device: auto, cpu or cuda.
        progress: told how far the work is.

    Raises:
        GraspError: an adapter is named twice or does not fit, or the rows cannot be used, or an adapter was trained on them.
    """
    progress = progress or Progress()
    progress.preparing()
    places = [str(place) for place in adapters]
    alone = [place for place in places if place == BACKBONE and not is_folder(Path(place))]
    real = [place if place in alone else os.path.realpath(expanded(place)) for place in places]
    if twice := next((place for place, path in zip(places, real, strict=True) if real.count(path) > 1), None):
        raise AdapterError(f"{quoted(twice)} is named twice; name each adapter once")
    read = {place: read_adapter(place) for place in places if place not in alone}
    if not read:
        raise AdapterError("there is no adapter to judge; give at least one PEFT folder or hub id")
    said = (adapter.info.answers for adapter in read.values())
    form = next((answers for answers in said if answers is not None and answers.task is not None), None)
    corpus = _corpus(rows, form, columns, sheet)
    contestants, first = _contestants(read), next(iter(read))
    loaded = backbone_of(
        read[first], backbone or backbone_of_run(first), device, revision=revision, trust_remote_code=trust_remote_code
    )
    for adapter in read.values():
        check_fits(adapter, loaded)
    if alone or len(contestants) == 1:
        contestants.append(Contestant(BACKBONE))
    contestants = [replace(each, form=_form(each.form, form, corpus)) for each in contestants]
    return _judged(corpus, language, contestants, loaded, chat, progress)


def _corpus(file: str | Path, form: Answers | None, columns: Mapping[str, str] | None, sheet: str | None) -> Corpus:
    """The rows of a file, as the task that the adapters were trained for, or else the one that their columns fit."""
    name = str(file)
    option = "--column" if columns else None
    renamed = columns or (form.columns if form else None)
    corpus = read_corpus(name, resolve_file(name), Path(), form.task if form else None, renamed, sheet, option=option)
    if corpus.unanswered:
        logger.warning("%d rows of %s have no answer and are left out", corpus.unanswered, name)
    if len(corpus.records) < 2:  # an answer is needed in each
        raise DataError(f"{name} has {len(corpus.records)} rows to judge by; at least 2 are needed")
    return corpus


def _contestants(read: Mapping[str, LoadedAdapter]) -> list[Contestant]:
    names = [adapter.name for adapter in read.values()]
    names = names if len(set(names)) == len(names) else list(read)
    if BACKBONE in names:
        raise AdapterError(f"an adapter is called {BACKBONE!r}, which means the model alone here; rename its folder")
    for name, adapter in zip(names, read.values(), strict=True):
        if adapter.info.answers and adapter.info.answers.labels:
            check_labels(adapter.info.answers.labels, f"adapter {name}")
    return [
        Contestant(
            name,
            adapter.weights.together(),
            adapter.info.answers or Answers(),
            adapter.chat_template,
            frozenset(adapter.info.rows),
        )
        for name, adapter in zip(names, read.values(), strict=True)
    ]


def _form(said: Answers, other: Answers | None, corpus: Corpus) -> Answers:
    """How a contestant is asked, and how long its answers may be."""
    usual = other or Answers(corpus.answer_tokens, () if corpus.several_lines else ("\n",))
    form = usual if said.task is None else said
    if form.task not in (None, corpus.task):
        raise AdapterError(
            f"an adapter was trained for the task {form.task}, and the rows are of the task {corpus.task}"
        )
    return form


def _judged(
    corpus: Corpus,
    language: str,
    contestants: Sequence[Contestant],
    loaded: Backbone,
    chat: bool | None,
    progress: Progress,
) -> Judgement:
    """Let each contestant answer the rows."""
    records = corpus.records
    groups = join_groups(keys_with_turns(records))
    names = [groups[next(iter(record.keys))] for record in records]
    metrics, labels = task_fields(corpus.task).metrics, _labels(corpus, contestants)
    references = [record.references for record in records]
    answers: dict[str, list[Prediction]] = {}
    scores: dict[str, dict[str, float | None]] = {}
    signatures: dict[str, str] = {}
    prompts: tuple[str, ...] = ()
    for number, contestant in enumerate(contestants, start=1):
        progress.method(contestant.name, number, len(contestants))
        encoder, form = _encoder(contestant, corpus, language, loaded, chat), contestant.form
        examples = [example for example in encoder.encode(records, names, Tally()) if example is not None]
        _check_rows(contestant, examples, corpus)
        prompt_ids, right = [row.prompt_ids for row in examples], [row.completion_ids for row in examples]
        chosen = encode_labels(form.labels or corpus.labels, encoder) if labels else None
        settings = GenerationSettings(form.max_new_tokens, form.stop)
        place = attached(loaded.model, contestant.weights) if contestant.weights else nullcontext(loaded.model)
        with place as model:
            progress.begin("answers")
            ends, tell = {ids[-1] for ids in right}, progress.answered
            found = answer(model, encoder.tokenizer, prompt_ids, settings, tell, ends, chosen, right)
            texts, losses = [text for text, _ in found], [loss for _, loss in found]
        results = score(metrics, texts, references, language, labels)
        prompts = prompts or tuple(example.prompt for example in examples)
        signatures |= {name: result.signature for name, result in results.items()}
        values = {name: result.value for name, result in results.items()}
        scores[contestant.name] = {TEST_LOSS: sum(losses) / len(losses), **values}
        available = {name: result for name, result in results.items() if result.value is not None}
        answers[contestant.name] = [
            Prediction(
                id=example.public_id,
                prediction=texts[row],
                references=example.references,
                loss=losses[row],
                scores={name: result.per_example[row] for name, result in available.items()},
                statistics={name: result.statistics[row] for name, result in available.items() if result.statistics},
            )
            for row, example in enumerate(examples)
        ]
    return Judgement(
        loaded.name,
        corpus.name,
        language,
        corpus.task,
        len(set(names)),
        prompts,
        answers,
        scores,
        signatures,
        _pairs(answers, names),
    )


def _labels(corpus: Corpus, contestants: Sequence[Contestant]) -> tuple[str, ...]:
    """Of a classification, all labels that rows have or adapters answer."""
    if not task_fields(corpus.task).chooses:
        return ()
    known = (corpus.labels, *(each.form.labels for each in contestants))
    return check_labels((label for labels in known for label in labels), f"{corpus.name} and the adapters")


def _encoder(contestant: Contestant, corpus: Corpus, language: str, loaded: Backbone, chat: bool | None) -> Encoder:
    """What puts the rows into the form that a contestant was trained with."""
    tokenizer, form = loaded.tokenizer, contestant.form
    if contestant.chat_template not in (None, getattr(tokenizer, "chat_template", None)):
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = contestant.chat_template
    talks = any(record.messages for record in corpus.records)
    in_chat = form.chat_template if form.task else talks and bool(tokenizer.chat_template)
    in_chat = in_chat if chat is None else chat
    check_tokenizer(tokenizer, chat=in_chat)
    worded = language if built_in_template(corpus.task, language) else FALLBACK_LANGUAGE
    template = resolve_template(corpus.task, worded, form.prompt, form.completion, in_chat)
    return Encoder(tokenizer, corpus.task, template, sys.maxsize, form.max_document_tokens, in_chat, ends_turns=talks)


def _check_rows(contestant: Contestant, examples: Sequence[Example], corpus: Corpus) -> None:
    """Refuse rows that a contestant knows, and rows of which it cannot see the answer: all are judged on the same ones."""
    name, total = quoted(contestant.name), len(examples)
    if known := sum(example.marks[0] in contestant.rows for example in examples):
        raise AdapterError(
            f"adapter {name} was trained on {known} of the {total} rows of {corpus.name}, so its scores would be too high; judge "
            "on rows that no adapter knows"
        )
    if related := sum(not contestant.rows.isdisjoint(example.marks) for example in examples):
        text = "adapter %s was trained on rows that share an id, a text or an article with %d of the %d rows of %s"
        logger.warning(text, name, related, total, corpus.name)
    if len(examples) < len(corpus.records):
        raise DataError(
            f"{len(corpus.records) - len(examples)} rows of {corpus.name} lose their answer where {quoted(contestant.name)} cuts "
            f"texts to {contestant.form.max_document_tokens} tokens; shorten or remove them"
        )


def _pairs(answers: Mapping[str, Sequence[Prediction]], groups: Sequence[str]) -> tuple[Pair, ...]:
    """Every pair of contestants, by the loss and each score."""
    first = next(iter(answers.values()))[0]
    pairs = []
    for name in (TEST_LOSS, *first.scores):
        corpus_score = METRICS[name].from_statistics if name in METRICS else None
        runs: dict[str, Any] = {}
        for contestant, rows in answers.items():
            if name == TEST_LOSS:
                runs[contestant] = [row.loss for row in rows]
            else:
                runs[contestant] = [list(row.statistics[name]) if corpus_score else row.scores[name] for row in rows]
        compared = compare_all_pairs(runs, groups=groups, corpus_score=corpus_score, higher_is_better=name != TEST_LOSS)
        pairs += [Pair(*both, name, comparison) for both, comparison in compared.items()]
    return tuple(pairs)

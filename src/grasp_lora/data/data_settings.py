"""Settings of the data: task, files or hub data sets, sizes of the splits, prompts and length limits."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from grasp_lora.data.records import FIELDS, check_labels
from grasp_lora.data.tasks import resolve_template, task_fields
from grasp_lora.text.languages import language_code


@dataclass(frozen=True)
class CorpusSettings:
    """Data of one language: one pool (`files` or `hub`) split by counts, or files for each split.

    Args:
        language: ISO 639 code such as `en`, `ar`, `zh`; chooses prompts and metrics.
        files: the pool: paths, or `demo:NAME` for a built-in text.
        sheet: of `.xlsx` workbooks, and of no other file; None takes the first that is not hidden.
        hub, hub_config, hub_split: the pool from a data set on the hub; the split defaults to `train`.
        columns: field -> column of generic records; fields are the task's, and id, group, title, references, messages.
        train, dev, micro_dev, test: how many examples. For a pool, None means 100 test, 50 dev and 16 micro-dev
            examples of the target, a tenth (at most 1000) for the source's dev, and all the rest for train. For
            files of one split None means all, and a count is a cap. dev, micro_dev and test may be 0, train
            not; without micro_dev the controller has to probe dev.
        train_files, dev_files, test_files: files of each split, in place of a pool. The micro-dev set is taken by whole
            groups from the dev files, or else the train files; None then means 16, but at most a third of their rows.
            test_files may also stand beside files: all of them are tested on, with `test` examples of the pool, and what
            shares an id, a text or an article with them is left out of the pool.
        prompt, completion: templates for this language; None takes those of `data`.

    Raises:
        ValueError: a value is out of range, the language is no code, or two ways to give the data are mixed.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    language: str
    files: tuple[str, ...] = ()
    sheet: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    hub_split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    train: int | None = None
    dev: int | None = None
    micro_dev: int | None = None
    test: int | None = None
    train_files: tuple[str, ...] = ()
    dev_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    prompt: str | None = None
    completion: str | None = None

    def __post_init__(self) -> None:
        language_code(self.language)
        for fault in self._faults():
            raise ValueError(fault)

    def _faults(self) -> Iterator[str]:
        ways = [name for name in ("files", "hub", "train_files") if getattr(self, name)]
        if len(ways) != 1:
            yield (
                f"data of {self.language} is given by {' and '.join(ways) or 'nothing'}; "
                "give exactly one of files as a list (a pool), hub (a pool) and files with train (and dev, test)"
            )
        if not self.explicit and (self.dev_files or (self.test_files and self.hub)):
            yield f"files of single splits need files of train, and exclude {ways[0]}"
        if self.hub is None and (self.hub_config or self.hub_split):
            yield "hub_config and hub_split need hub: the name of the data set"
        if unknown := sorted(set(self.columns) - FIELDS):
            yield f"columns names {', '.join(unknown)}; allowed: {', '.join(sorted(FIELDS))}"
        for name, least in (("train", 1), ("dev", 0), ("micro_dev", 0), ("test", 0)):
            count = getattr(self, name)
            if count is not None and count < least:
                yield f"{name} must be >= {least}, or left out; it is {count}"
            if self.explicit and name in ("dev", "test") and count and not getattr(self, name + "_files"):
                yield f"{name} is {count} but there are no files of {name}; name them, or remove {name}"

    @property
    def all_files(self) -> tuple[str, ...]:
        """The files of the pool and of single splits."""
        return (*self.files, *self.train_files, *self.dev_files, *self.test_files)

    @property
    def explicit(self) -> bool:
        """Whether each split has files of its own."""
        return bool(self.train_files)


@dataclass(frozen=True)
class DataSettings:
    """Task, data of both languages, prompts and length limits.

    Args:
        task: `qa`, `summarization`, `classification`, `translation` or `completion`.
        source: data of the rich language; None where adapters are given, or for a single step that trains on the target alone.
        target: data of the language to adapt to.
        root: folder of relative paths, itself relative to the recipe's; tried before GRASP_LORA_DATA and that one.
        max_tokens: examples of more tokens (prompt, completion and end) are dropped, >= 8.
        max_document_tokens: articles, contexts and texts to classify are cut to this many tokens before templating; None to cut
            nothing. Not with `translation` and `completion`.
        labels: of a classification, all that an answer may be; none takes those of the target's training rows.
        prompt, completion: templates in place of the built-in ones, for both languages; each may have its own.
        chat_template: give the prompt as a user turn through the tokenizer's chat template, and end the answer as that ends a
            turn. None does so where the data are conversations and there is a template. Without one a line break ends each turn.
        skip_unanswered: leave out rows without an answer, and count them; false refuses them.

    Raises:
        ValueError: a value is out of range, or a template names an unknown field.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    task: str
    target: CorpusSettings
    source: CorpusSettings | None = None
    root: str | None = None
    max_tokens: int = 512
    max_document_tokens: int | None = None
    labels: tuple[str, ...] = ()
    prompt: str | None = None
    completion: str | None = None
    chat_template: bool | None = None
    skip_unanswered: bool = False

    def __post_init__(self) -> None:
        for fault in self._faults():
            raise ValueError(fault)
        if self.labels:
            check_labels(self.labels, "labels")
        for corpus in filter(None, (self.target, self.source)):
            resolve_template(self.task, "en", *self.templates(corpus))

    def _faults(self) -> Iterator[str]:
        task, source, most = task_fields(self.task), self.source, self.max_document_tokens
        if self.max_tokens < 8:
            yield f"max_tokens is {self.max_tokens}; it must be >= 8"
        if most is not None and most < 1:
            yield f"max_document_tokens is {most}; it must be >= 1, or left out"
        if most is not None and task.document is None:
            yield f"max_document_tokens: the task {self.task} has no document to cut; remove it"
        if self.labels and not task.chooses:
            yield f"labels: the task {self.task} writes its answers; remove them, or set task to classification"
        if source is not None and (source.test or source.micro_dev or source.test_files):
            yield "the source has only train and dev splits: remove its test and micro_dev settings"

    def templates(self, corpus: CorpusSettings) -> tuple[str | None, str | None]:
        """The templates of prompt and completion of a language; None where the built-in one serves."""
        prompt = self.prompt if corpus.prompt is None else corpus.prompt
        return prompt, self.completion if corpus.completion is None else corpus.completion

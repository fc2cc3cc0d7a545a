"""Settings of the data: task, files or hub data sets, sizes of the splits, prompts and length limits.

target: {language: sw, files: rows.csv, dev: 50}                        # a pool, which is split here
target: {language: sw, files: {train: a.csv, dev: b.csv, test: c.csv}}  # splits that exist
target: {language: ar, hub: [facebook/mlqa, mlqa.ar.ar, test]}          # name, configuration and split on the hub
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from grasp_lora.data.records import FIELDS, check_labels
from grasp_lora.data.tasks import resolve_template, task_fields
from grasp_lora.text.display import listed
from grasp_lora.text.languages import language_code

Texts = Annotated[  # a single text stands for a list of one
    tuple[str, ...],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    WithJsonSchema({"type": ["array", "string"], "items": {"type": "string"}}),
]


def _parts(files: Any) -> dict[str, Any]:
    """Files by the part that they are: a list is a pool, and an empty one says nothing."""
    parts = files if isinstance(files, Mapping) else {"pool": files}
    return {name: places for name, places in parts.items() if places not in ([], ())}


Files = Annotated[
    dict[Literal["pool", "train", "dev", "test"], Texts], BeforeValidator(_parts, json_schema_input_type=Any)
]


@dataclass(frozen=True)
class CorpusSettings:
    """Data of one language: one pool (`files` or `hub`) split by counts, or files for each split.

    Args:
        language: ISO 639 code such as `en`, `ar`, `zh`; chooses prompts and metrics.
        files: data files, or `demo:NAME` for a built-in text. A list is a pool, which is split by the counts; {train: ...,
            dev: ..., test: ...} are splits that exist; {pool: ..., test: ...} is a pool with a test set beside it. All of that
            is tested on, with `test` examples of the pool, and what shares an id, a text or an article with it is left out of
            the pool.
        sheet: of `.xlsx` workbooks, and of no other file; None takes the first that is not hidden.
        hub: the pool from a data set on the hub: its name, or [name, configuration, split]; the split is `train` if it is left
            out.
        columns: field -> column of generic records; fields are the task's, and id, group, title, references, messages.
        train, dev, micro_dev, test: how many examples. For a pool, None means 100 test, 50 dev and 16 micro-dev
            examples of the target, a tenth (at most 1000) for the source's dev, and all the rest for train. For
            files of one split None means all, and a count is a cap; micro_dev is then taken by whole groups from the dev
            files, or else the train files, and None means 16, but at most a third of their rows. dev, micro_dev and test may
            be 0, train not; without micro_dev the controller has to probe dev.

    Raises:
        ValueError: the language is no code, or two ways to give the data are mixed.
    """

    language: str
    files: Files = field(default_factory=dict)
    sheet: str | None = None
    hub: Annotated[Texts, Field(max_length=3)] = ()
    columns: dict[str, str] = field(default_factory=dict)
    train: Annotated[int, Field(ge=1)] | None = None
    dev: Annotated[int, Field(ge=0)] | None = None
    micro_dev: Annotated[int, Field(ge=0)] | None = None
    test: Annotated[int, Field(ge=0)] | None = None

    def __post_init__(self) -> None:
        language_code(self.language)
        for fault in self._faults():
            raise ValueError(fault)

    def _faults(self) -> Iterator[str]:
        if bool(self.files) == bool(self.hub):
            yield f"data of {self.language} is given by {'files and hub' if self.hub else 'nothing'}; give files or hub"
        if self.files and not self.explicit and not {"pool"} <= set(self.files) <= {"pool", "test"}:
            yield f"files has {listed(self.files)}; give a list (a pool), pool and test, or train (and dev, test)"
        if unknown := sorted(set(self.columns) - FIELDS):
            yield f"columns names {', '.join(unknown)}; allowed: {', '.join(sorted(FIELDS))}"
        for name in ("dev", "test"):
            if self.explicit and name not in self.files and (count := getattr(self, name)):
                yield f"{name} is {count} but there are no files of {name}; name them, or remove {name}"

    @property
    def all_files(self) -> tuple[str, ...]:
        """The files of the pool and of single splits."""
        return tuple(name for names in self.files.values() for name in names)

    @property
    def explicit(self) -> bool:
        """Whether each split has files of its own."""
        return "train" in self.files and "pool" not in self.files


@dataclass(frozen=True)
class DataSettings:
    """Task, data of both languages, prompts and length limits.

    Args:
        task: `qa`, `summarization`, `classification`, `translation` or `completion`.
        source: data of the rich language, train and dev rows alone; None where adapters are given.
        target: data of the language to adapt to.
        root: folder of relative paths, itself relative to the recipe's; tried before GRASP_LORA_DATA and that one.
        max_tokens: examples of more tokens (prompt, completion and end) are dropped, >= 8.
        max_document_tokens: articles, contexts and texts to classify are cut to this many tokens before templating; None to cut
            nothing. Not with `translation` and `completion`.
        labels: of a classification, all that an answer may be; none takes those of the target's training rows.
        prompt, completion: template in place of the built-in one, with the fields of the task in braces; or one for each
            language, such as {sw: "..."}.
        chat_template: give the prompt as a user turn through the tokenizer's chat template, and end the answer as that ends a
            turn. None does so where the data are conversations and there is a template. Without one a line break ends each turn.
        skip_unanswered: leave out rows without an answer, and count them; false refuses them.

    Raises:
        ValueError: settings contradict each other, or a template names an unknown field.
    """

    task: str
    target: CorpusSettings
    source: CorpusSettings | None = None
    root: str | None = None
    max_tokens: Annotated[int, Field(ge=8)] = 512
    max_document_tokens: Annotated[int, Field(ge=1)] | None = None
    labels: tuple[str, ...] = ()
    prompt: str | dict[str, str] | None = None
    completion: str | dict[str, str] | None = None
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
        task, languages = task_fields(self.task), {corpus.language for corpus in (self.target, self.source) if corpus}
        for name, template in (("prompt", self.prompt), ("completion", self.completion)):
            if isinstance(template, Mapping) and (strange := sorted(template.keys() - languages)):
                yield f"{name} has a template for {listed(strange)}, but the data are of {listed(sorted(languages))}"
        if self.max_document_tokens is not None and task.document is None:
            yield f"max_document_tokens: the task {self.task} has no document to cut; remove it"
        if self.labels and not task.chooses:
            yield f"labels: the task {self.task} writes its answers; remove them, or set task to classification"
        if (source := self.source) is not None and (source.test or source.micro_dev or "test" in source.files):
            yield "the source has only train and dev splits: remove its test and micro_dev settings"

    def templates(self, corpus: CorpusSettings) -> tuple[str | None, str | None]:
        """The templates of prompt and completion of a language; None where the built-in one serves."""
        prompt, completion = (
            template.get(corpus.language) if isinstance(template, Mapping) else template
            for template in (self.prompt, self.completion)
        )
        return prompt, completion

"""The tasks, their fields and metrics, and the prompt and completion templates of each language as data."""

import logging
import string
from collections.abc import Sequence
from dataclasses import dataclass

from grasp_lora.errors import DataError
from grasp_lora.text.languages import language_code

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """Field names and metrics of a task."""

    inputs: tuple[str, ...]  # fields that a prompt template may name
    answer: str  # field that the model learns to write; only a completion template may name it
    metrics: tuple[str, ...]  # what it is judged by unless the recipe says otherwise
    document: str | None = None  # the input that may be cut when it is too long
    chooses: bool = False  # the answer is one of a few labels, which are scored; none is written; see `data.labels`


TASKS: dict[str, Task] = {
    "qa": Task(("context", "question"), "answer", ("exact_match", "f1"), document="context"),
    "summarization": Task(("document",), "summary", ("rougeL", "bleu"), document="document"),
    "classification": Task(("text",), "label", ("accuracy", "macro_f1"), document="text", chooses=True),
    "translation": Task(("source",), "target", ("chrf++", "bleu")),
    "completion": Task(("prompt",), "completion", ("exact_match", "rougeL")),
}


@dataclass(frozen=True)
class Template:
    """Prompt and completion text with {named} fields; `{{` and `}}` stand for literal braces."""

    prompt: str
    completion: str


INTO = "Text: {source}\nTranslation into "  # of prompts that `init` writes; the language and a colon follow
ANY_LANGUAGE = "any"
FALLBACK_LANGUAGE = "en"

# Chinese puts no space between the label and the answer.
TEMPLATES: dict[str, dict[str, Template]] = {
    "qa": {
        "en": Template("Context: {context}\nQuestion: {question}\nAnswer:", " {answer}"),
        "ar": Template("السياق: {context}\nالسؤال: {question}\nالإجابة:", " {answer}"),
        "zh": Template("背景：{context}\n问题：{question}\n答案：", "{answer}"),
    },
    "summarization": {
        "en": Template("Article: {document}\nSummary:", " {summary}"),
        "ar": Template("المقال: {document}\nالملخص:", " {summary}"),
        "zh": Template("文章：{document}\n摘要：", "{summary}"),
    },
    "classification": {
        "en": Template("Text: {text}\nLabel:", " {label}"),
        "ar": Template("النص: {text}\nالتصنيف:", " {label}"),
        "zh": Template("文本：{text}\n类别：", "{label}"),
    },
    "translation": {
        "en": Template("Source: {source}\nTranslation:", " {target}"),
        "ar": Template("النص الأصلي: {source}\nالترجمة:", " {target}"),
        "zh": Template("原文：{source}\n译文：", "{target}"),
    },
    "completion": {ANY_LANGUAGE: Template("{prompt}", "{completion}")},
}


def fields_of(template: str) -> list[str]:
    """The fields of a template, each once.

    >>> fields_of("Context: {context}\\nQuestion: {question}\\nAnswer:")
    ['context', 'question']
    """
    return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name))


def options_of(template: str) -> list[str]:
    """The options of `grasp-lora predict` that fill a prompt template; none where only rows do.

    >>> options_of("Text: {text}\\nLabel:"), options_of("{question}? {context}"), options_of("{context}{question}{hint}")
    (['--context'], ['--context', '--question'], [])
    """
    fields = fields_of(template)
    if len(fields) == 1:
        return ["--context"]
    return ["--context", "--question"] if set(fields) == {"context", "question"} else []


def task_fields(task: str) -> Task:
    """Return a task by its name."""
    if task not in TASKS:
        raise DataError(f"there is no task {task!r}; allowed: {', '.join(TASKS)}")
    return TASKS[task]


def built_in_template(task: str, language: str) -> Template | None:
    """Return the template that comes with the package for a language, None where it has none of its own."""
    return TEMPLATES[task].get(language_code(language)) or TEMPLATES[task].get(ANY_LANGUAGE)


def resolve_template(
    task: str, language: str, prompt: str | None = None, completion: str | None = None, chat: bool = False
) -> Template:
    """Choose the built-in templates of a task and language, and put the overrides in their place.

    Args:
        task: a key of TASKS.
        language: code such as `ar` or `zh-Hans`; see `language_code`. A language without templates of its own takes the
            English ones, with a warning.
        prompt, completion: templates to use in place of the built-in ones.
        chat: the completion is a whole assistant turn, so the built-in one is the bare answer, also where it is written out, as
            `init` does.
    """
    fields = task_fields(task)
    built_in = built_in_template(task, language)
    if built_in is None:
        built_in = TEMPLATES[task][FALLBACK_LANGUAGE]
        if prompt is None or completion is None:
            logger.warning(
                "no built-in %s templates for language %r: using the English ones; "
                "set data.prompt and data.completion to write your own",
                task,
                language,
            )
    if chat and completion in (None, built_in.completion):
        completion = "{" + fields.answer + "}"
    template = Template(
        prompt=built_in.prompt if prompt is None else prompt,
        completion=built_in.completion if completion is None else completion,
    )
    check_template("prompt", template.prompt, fields.inputs)
    check_template("completion", template.completion, (fields.answer,))
    return template


def check_template(kind: str, template: str, allowed: Sequence[str]) -> None:
    """Refuse a template that names no field, or anything but plain `{field}` of the allowed ones."""
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
        strange = next((f"{{{part[1]}}}" for part in parts if part[1] not in allowed or part[2] or part[3]), None)
        fault = f"names {strange}" if strange else None if parts else "names no field"
    except ValueError as error:
        fault = f"cannot be read ({error}); write {{{{ or }}}} for a literal brace"
    if fault:
        choices = ", ".join("{" + field + "}" for field in allowed)
        raise DataError(f"{kind} template {template!r} {fault}; allowed fields: {choices}")

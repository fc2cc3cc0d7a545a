"""A first recipe for a user's own examples: task, columns and split sizes are read off the data."""

import json
import math
import os
import random
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grasp_lora.data.places import DEMO_PREFIX, resolve_file
from grasp_lora.data.records import XLSUM_COLUMNS, Pool, Record, read_content, read_files
from grasp_lora.data.splits import assign, join_groups
from grasp_lora.data.tasks import TASKS
from grasp_lora.errors import AdapterError, DataError, RecipeError
from grasp_lora.method.presets import WITH_DEV, WITHOUT_DEV, preset
from grasp_lora.models.adapters import CONFIG_FILE
from grasp_lora.models.backbone import EMBEDDED_HUB_ID, EMBEDDED_NAME
from grasp_lora.models.reading import read_base_model
from grasp_lora.recipes.load import validate
from grasp_lora.storage.reading import is_there
from grasp_lora.text.display import listed, quoted
from grasp_lora.text.languages import language_code

PAPER_SIZES = {"test": 100, "dev": 50, "micro_dev": 16, "train": 50}  # Paper: experimental setup
FEWEST = 36
FEWEST_DEV = 8
FEWEST_SOURCE = 20
MOST_SOURCE = 1000  # an epoch of them takes minutes on two CPU cores
ORDERS = 20  # random orders of the groups in which the split sizes must fit
EPOCHS = 5  # of the controller run, as the template has it
LATE_ROUNDS = 3  # wanted in its second half, without a dev set

# Column names, in lower case, that are understood for each field of a task.
COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "qa": {"context": ("context",), "question": ("question",), "answer": ("answer", "answers")},
    "summarization": {"document": ("document", "text", "article"), "summary": ("summary",)},
    "completion": {"prompt": ("prompt",), "completion": ("completion",)},
}
# What others call prompt and completion, where no column beside them may be a part of the prompt.
PROMPT_NAMES = ("prompt", "instruction", "question")
COMPLETION_NAMES = ("completion", "response", "output", "answer")
PARTS_OF_PROMPTS = ("input", "context", "system", "history")


@dataclass(frozen=True)
class _Corpus:
    """A data file as the recipe will name it.

    Args:
        name: path relative to the recipe's folder, or `demo:NAME`.
        task: that its columns fit.
        format: `auto`, `squad` or `xlsum`.
        columns: field -> column, where they differ.
        pool: its records.
    """

    name: str
    task: str
    format: str
    columns: dict[str, str]
    pool: Pool


@dataclass(frozen=True)
class _Sizes:
    """How many examples go where; `source` are those that no held-out target example excludes, maybe of one group alone."""

    splits: dict[str, int]
    source: int
    one_source_group: bool


def write_recipe(
    data: Path,
    language: str,
    output: Path | None,
    source: Sequence[str],
    source_language: str,
    backbone: str | None = None,
) -> Path:
    """Write a commented recipe for a file of target examples.

    Args:
        data: CSV, TSV, JSON, JSONL, parquet or SQuAD JSON of the target language, at least about 40 examples.
        language: its language, such as `ar`.
        output: the recipe file; None for the name of the data with `.yaml`, in the working folder.
        source: data files of the rich language, or PEFT adapters (folders or hub ids) trained on it; may be empty.
        source_language: language of the source data.
        backbone: hub id, folder or `gemma3-270m`; None for the one that the adapters in `source` name, or else `gemma3-270m`.

    Returns:
        The recipe file.

    Raises:
        GraspError: the data cannot be used, the source is neither data nor adapter, or the recipe exists already.
    """
    file = Path(f"{data.stem}.yaml") if output is None else output
    if is_there(file):
        raise RecipeError(f"{file} exists already; remove it, or choose another name with --output")
    _check_languages(language, source_language)
    target = _read(str(data), data, file.parent)
    files, adapters = _sort_out(source)
    backbone = backbone or _backbone_of(adapters)
    if backbone == EMBEDDED_NAME and _several_turns(target.pool):
        raise RecipeError(
            f"{data} holds conversations of several turns, which need a backbone with a chat template, and {EMBEDDED_NAME} has "
            "none; name one with --backbone"
        )
    sources = [
        _read(name, resolve_file(name) if name.startswith(DEMO_PREFIX) else Path(name), file.parent, target.task)
        for name in files
    ]
    if len({(corpus.format, tuple(corpus.columns.items())) for corpus in sources}) > 1:
        raise DataError("the source files differ in their columns; convert them to the same ones")
    sizes = _choose_sizes(target, sources)
    facts = {
        "language": language,
        "source_language": source_language,
        "adapters": [_relative(place, file.parent) if Path(place).is_dir() else place for place in adapters],
        "backbone": _relative(backbone, file.parent) if Path(backbone).is_dir() else backbone,
    }
    text = _render(file, target, sizes, sources, facts)
    validate(yaml.safe_load(text), str(file))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for corpus in (target, *sources):
            resolve_file(corpus.name, base=file.parent)  # which refuses a name that is found in two places
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{file} cannot be written ({error.strerror}); choose another place with --output") from error
    return file


def _check_languages(*languages: str) -> None:
    for language in languages:
        language_code(language)


def _read(name: str, path: Path, folder: Path, task: str | None = None) -> _Corpus:
    """Read a file and find its task; with a given task, its columns must fit that one."""
    content = read_content(name, path, "auto")
    columns: dict[str, str] = {}
    if isinstance(content, dict):
        found, format = "qa", "squad"
    else:
        if not content:
            raise DataError(f"{name} holds no records")
        found, columns = _guess(list(map(str, content[0][1])), name, task)
        format = "auto"
        if found == "summarization" and set(XLSUM_COLUMNS.values()) <= content[0][1].keys():
            columns = {}  # of XL-Sum, which the reader knows by its columns
    if task is not None and found != task:
        raise DataError(
            f"{name} is data for the task {found}, but the target's is {task}; give source data of that task"
        )
    pool = read_files([(name, path)], found, format, columns)
    written = name if name.startswith(DEMO_PREFIX) else _relative(name, folder)
    return _Corpus(written, found, format, columns, pool)


def _guess(found: Sequence[str], name: str, preferred: str | None) -> tuple[str, dict[str, str]]:
    """Return a task whose fields are all among the columns, and the columns that are called otherwise."""
    by_name = {column.strip().lower(): column for column in found}
    for task in sorted(COLUMNS, key=lambda task: task != preferred):
        chosen = {
            field: next((by_name[known] for known in names if known in by_name), None)
            for field, names in COLUMNS[task].items()
        }
        if task == "completion" and "messages" in found:
            return task, {}
        if all(chosen.values()):
            # The reader finds `answers` by itself, and there it may hold SQuAD's lists.
            understood = {field: ("answer", "answers") if field == "answer" else (field,) for field in chosen}
            return task, {field: str(column) for field, column in chosen.items() if column not in understood[field]}
    if not by_name.keys() & set(PARTS_OF_PROMPTS):
        prompts, completions = (
            [by_name[name] for name in names if name in by_name] for names in (PROMPT_NAMES, COMPLETION_NAMES)
        )
        if prompts and completions:
            named = {"prompt": prompts[0], "completion": completions[0]}
            return "completion", {field: column for field, column in named.items() if column != field}
    known = "; ".join(f"{task}: {' and '.join(fields)}" for task, fields in COLUMNS.items())
    if len(found) == 1 and re.search(r"[;\t|]", found[0]):
        raise DataError(
            f"{name} has one column, {quoted(found[0])}: its cells seem to be separated by something else than its suffix says; "
            "save it with commas as .csv, or with tabs as .tsv"
        )
    if not found:
        raise DataError(f"{name} begins with a record without fields; give each record those of a task ({known})")
    raise DataError(
        f"{name} has the columns {listed(found)}, which fit no task ({known}, or messages); rename them, or begin with one of "
        "`grasp-lora recipes` and name them there, such as data.target.columns: {prompt: NAME, completion: NAME}"
    )


def _sort_out(source: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell data files from adapters."""
    files, adapters = [], []
    for place in source:
        path = Path(place)
        if path.is_file() or place.startswith(DEMO_PREFIX):
            files.append(place)
        elif path.is_dir():
            if not (path / CONFIG_FILE).is_file():
                raise AdapterError(
                    f"source {place} is a folder without {CONFIG_FILE}; give a PEFT adapter or a data file"
                )
            adapters.append(place)
        elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place) and path.suffix.lower() not in (
            ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet"
        ):  # fmt: skip
            adapters.append(place)
        else:
            raise DataError(
                f"source {place!r} is missing; give a data file, the folder of a PEFT adapter, or a hub id such as org/name"
            )
    if files and adapters:
        raise RecipeError("sources are data files and adapters at once; give files to train one adapter, or adapters")
    return files, adapters


def _choose_sizes(target: _Corpus, sources: Sequence[_Corpus]) -> _Sizes:
    """Find the largest split sizes that whole groups can fill in any order."""
    records = target.pool.records
    if len(records) < FEWEST:
        raise DataError(
            f"{target.name} has {len(records)} examples; at least {FEWEST} are needed for train, micro-dev and test "
            "(about 216 for the sizes of the paper)"
        )
    source_records = [record for corpus in sources for record in corpus.pool.records]
    joined = join_groups(record.keys for record in (*records, *source_records))
    groups = _by_group(records, joined)
    source_groups = _by_group(source_records, joined)
    for share in (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5):
        total = int(len(records) * share)
        if total < FEWEST:
            break
        sizes = _sizes(total)
        left = [_left_for_source(groups, source_groups, sizes, order) for order in range(ORDERS)]
        if None not in left:
            counts = [sum(found) for found in left if found is not None]
            alone = any(len(found) < 2 for found in left if found is not None)
            return _Sizes(sizes, _enough_source(min(counts), sources), alone)
    largest = max(groups.values(), key=len)
    column, value = _common_to(largest)
    shared = f"the {column} {quoted(value)}" if column else "one prompt, context or document"
    rename = (
        f", or rename the column {column} if it means something else" if column and target.format != "squad" else ""
    )
    raise DataError(
        f"the {len(records)} examples of {target.name} form {len(groups)} groups of what belongs together, the largest of "
        f"{len(largest)}, which have {shared}; splits take whole groups, so more of them are needed: add examples of other "
        f"texts{rename}"
    )


def _common_to(records: Sequence[Record]) -> tuple[str | None, str]:
    """The column and the value that most records of a group have in common; no column where it is the text itself."""
    counts = Counter(key for record in records for key in record.keys)
    kind, _, value = max(counts, key=lambda key: (counts[key], key)).partition(":")
    column = {"id": "id", "group": "group", "article": "title"}.get(kind)
    return column, value.rpartition("#")[2] if kind == "article" else value


def _by_group(records: Sequence[Record], joined: Mapping[str, str]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for record in records:
        groups.setdefault(joined[next(iter(record.keys))], []).append(record)
    return groups


def _sizes(examples: int) -> dict[str, int]:
    """The paper's sizes if there are so many examples, else sizes that leave a fifth or more for the test."""
    micro_dev = min(PAPER_SIZES["micro_dev"], max(8, examples // 13))
    dev = min(PAPER_SIZES["dev"], examples // 5)
    if dev < FEWEST_DEV:
        dev = 0
    test = math.ceil(examples / 5)
    train = min(PAPER_SIZES["train"], max(examples - micro_dev - dev - test, 1), math.ceil(examples * 0.36))
    test = min(PAPER_SIZES["test"], examples - micro_dev - dev - train)
    return {"test": test, "dev": dev, "micro_dev": micro_dev, "train": train}


def _left_for_source(
    groups: Mapping[str, Sequence[Any]], source: Mapping[str, Sequence[Any]], sizes: Mapping[str, int], order: int
) -> list[int] | None:
    """Split the groups in one random order: None if a split stays short, else the sizes of the source groups that share none."""
    names = sorted(groups)
    random.Random(order).shuffle(names)
    splits = assign([[(name, record) for record in groups[name]] for name in names], dict(sizes))  # type: ignore[misc]
    if any(len(splits[name]) < size for name, size in sizes.items()):
        return None
    pairs: list[tuple[str, Any]] = [pair for name in ("test", "dev", "micro_dev") for pair in splits[name]]  # type: ignore[misc]
    held_out = {name for name, _ in pairs}
    return [len(members) for name, members in source.items() if name not in held_out]


def _enough_source(left: int, sources: Sequence[_Corpus]) -> int:
    if sources and left < FEWEST_SOURCE:
        read = sum(len(corpus.pool.records) for corpus in sources)
        raise DataError(
            f"the source has {read} examples, of which {left} share no question, context or article with held-out target "
            f"examples; at least {FEWEST_SOURCE} are needed: give more source data"
        )
    return left


def _relative(place: str, folder: Path) -> str:
    return Path(os.path.relpath(place, folder)).as_posix()


def _render(file: Path, target: _Corpus, sizes: _Sizes, sources: Sequence[_Corpus], facts: Mapping[str, Any]) -> str:
    """Fill the template; what it shows as defaults is checked against the settings in the tests."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("grasp_lora.recipes", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # JSON is YAML on one line, with all text quoted: no language code or file name is read as something else.
    environment.filters["yaml"] = lambda value: json.dumps(value, ensure_ascii=False)
    task = TASKS[target.task]
    records, splits = len(target.pool.records), sizes.splits
    spare = records - sum(splits.values())
    steps = EPOCHS * splits["train"]
    # Without a dev set the final run trains all epochs: its end decides, not its best moment.
    name = WITH_DEV if splits["dev"] else WITHOUT_DEV
    every = splits["train"] if splits["dev"] else math.ceil(steps / (2 * (LATE_ROUNDS - 1)))
    # A split takes whole groups, so that a single one would be all dev.
    source_dev = 0 if sizes.one_source_group else min(sizes.source // 10, MOST_SOURCE // 10)
    return environment.get_template("recipe.yaml.j2").render(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._") or f"{target.task}-{facts['language']}",
        file=shlex.quote(file.name),
        task=target.task,
        inputs=", ".join("{" + field + "}" for field in task.inputs),
        answer="{" + task.answer + "}",
        target=target,
        records=records,
        sizes=splits,
        spare=spare,
        sources=sources,
        source_records=sum(len(corpus.pool.records) for corpus in sources),
        source_dev=source_dev,
        source_train=MOST_SOURCE if sizes.source - source_dev > MOST_SOURCE else None,
        source_left=sizes.source - source_dev,
        several_turns=_several_turns(target.pool),
        every=every,
        preset=name,
        candidates=preset(name).policy.candidates,
        rounds=len(preset(name).rounds.round_steps(steps, every)),
        answer_tokens=_answer_tokens(target.pool),
        several_lines=any("\n" in record.answer for record in target.pool.records),
        **facts,
    )


def _backbone_of(adapters: Sequence[str]) -> str:
    """The backbone that all adapters name."""
    named = {}
    for place in adapters:
        try:
            named[place] = read_base_model(place)
        except AdapterError as error:
            if Path(place).is_dir():
                raise
            raise AdapterError(f"{error}. With --backbone the adapter is not looked up") from error
    if unknown := [place for place, base in named.items() if not base]:
        raise AdapterError(f"the adapter {unknown[0]} does not name its backbone; name it with --backbone")
    found = {EMBEDDED_NAME if base == EMBEDDED_HUB_ID else str(base) for base in named.values()}
    if len(found) > 1:
        raise AdapterError(f"the adapters are of different backbones, {listed(sorted(found))}; give adapters of one")
    return found.pop() if found else EMBEDDED_NAME


def _several_turns(pool: Pool) -> bool:
    return any(len(record.messages) > 2 for record in pool.records)


def _answer_tokens(pool: Pool) -> int:
    """Room for nearly all answers: a token is about three bytes of text, and multiples of 16 look deliberate.

    `grasp-lora check`, which has the tokenizer, says where it is too little.
    """
    longest = sorted(len(record.answer.encode()) for record in pool.records)[int(len(pool.records) * 0.98) - 1]
    return max(32, min(512, 16 * math.ceil(longest / 3 / 16)))

"""A first recipe for a user's own examples: task, columns and split sizes are read off the data.

What the held-out splits leave is for training. Sizes are those that whole groups can fill in any order, so that no draw fails.
"""

import json
import math
import random
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp_lora.data.files import DEMO_PREFIX, READERS, resolve_file
from grasp_lora.data.groups import by_group, join_groups, keys_with_turns
from grasp_lora.data.records import Record, check_labels, check_shared
from grasp_lora.data.splits import HELD_OUT, PAPER_SIZES, assign
from grasp_lora.data.tasks import FALLBACK_LANGUAGE, INTO, TEMPLATES, built_in_template
from grasp_lora.errors import AdapterError, DataError, RecipeError
from grasp_lora.models.adapter_files import CONFIG_FILE, read_backbone, read_how_asked
from grasp_lora.models.model_settings import EMBEDDED_ADAPTER, EMBEDDED_NAME
from grasp_lora.recipes.corpus import CUT_DOCUMENT, MOST_TOKENS, Corpus, parse_columns, read_corpus, relative
from grasp_lora.recipes.load import backbone_of_run, validate
from grasp_lora.recipes.recipe import schema_text
from grasp_lora.recipes.text import SCHEMA_FILE, SCHEMA_LINE, parse
from grasp_lora.storage.claims import claim
from grasp_lora.storage.reading import expanded, is_file, is_folder, is_there, reading
from grasp_lora.storage.writing import write_whole
from grasp_lora.text.characters import are_glued
from grasp_lora.text.display import listed
from grasp_lora.text.languages import language_code, language_name

SOURCE_COLUMN = "--source-column"
MOST_SOURCE = 1000  # an epoch of them takes minutes on two CPU cores
MOST_TRAIN = 600  # trained on six or nine times each in a run: more take longer than a first run should
FEWEST = 30
FEWEST_SOURCE = 20
MICRO_DEV = 16  # rows that the controller probes. Paper: micro-dev set
FEWEST_TRAIN = 20  # beside test and micro-dev, where a prune ratio is learned
GLUED = 4  # one prompt of so many runs on into its answer: `check` warns where half of the training rows do
ORDERS = 20  # random orders of the groups in which the split sizes must fit


@dataclass(frozen=True)
class Sizes:
    """How many examples go where, `spare` ones nowhere; `source` are those that no held-out target example excludes, maybe of one
    group alone."""

    splits: dict[str, int]
    spare: int
    source: int
    one_source_group: bool


def write_recipe(
    data: Path,
    language: str,
    output: Path | None,
    source: Sequence[str],
    source_language: str | None,
    backbone: str | None = None,
    *,
    columns: Sequence[str] = (),
    source_columns: Sequence[str] = (),
    sheet: str | None = None,
    source_sheet: str | None = None,
    skip_unanswered: bool = False,
    target_adapter: str | None = None,
    learn_ratio: bool = False,
    prompt: str | None = None,
) -> tuple[Path, int]:
    """Write a commented recipe for a file of target examples, and beside it the schema by which editors complete its keys.

    Args:
        data: CSV, TSV, XLSX, JSON, JSONL, parquet or SQuAD JSON of the target language, at least 30 examples.
        language: its language, such as `ar`.
        output: the recipe file; None for the name of the data with `.yaml`, in the working folder.
        source: data files of the rich language, or PEFT adapters trained on it (folders, hub ids, or `english-qa`, which is
            included); empty takes `english-qa` for questions on the embedded backbone.
        source_language: language of the source data, of translations that of its answers; None for English.
        backbone: hub id, folder or `gemma3-270m`; None for the one that the adapters in `source` name, or else `gemma3-270m`.
        columns: such as `question=Swali`: columns of the data that are not called as the field.
        source_columns: the same for source files; empty takes those of `columns` that they have.
        sheet, source_sheet: of workbooks; None for the first that is not hidden.
        skip_unanswered: leave out rows without an answer, here and in runs of the recipe.
        target_adapter: PEFT adapter of the target language, to merge with that of `source`; its prune ratio is learned.
        learn_ratio: whether the recipe learns a prune ratio, with a few rows that are probed.
        prompt: that the adapters were trained on, where they do not say it themselves.

    Returns:
        The recipe file; about how many rows are left for training, since held-out splits take whole groups.

    Raises:
        GraspError: the data cannot be used, the source is missing or neither data nor adapter, or the recipe exists already.
    """
    # No command takes the default name for an option.
    file = Path(f"{data.stem.lstrip('-') or 'mine'}.yaml") if output is None else output
    _refuse_existing(file)
    for code in filter(None, (language, source_language)):
        language_code(code)
    target_columns, other_columns = parse_columns(columns), parse_columns(source_columns, SOURCE_COLUMN)
    target = read_corpus(
        str(data),
        data,
        file.parent,
        columns=target_columns,
        sheet=sheet,
        option="--column",
        skip_unanswered=skip_unanswered,
    )
    if not source and target.task == "qa" and source_language in (None, "en") and backbone in (None, EMBEDDED_NAME):
        source = [EMBEDDED_ADAPTER]
    files, adapters = _sort_out([str(expanded(place)) if place.startswith("~") else place for place in source])
    if target_adapter and not adapters:
        raise RecipeError(
            f"--target-adapter {target_adapter} is merged with an adapter of the rich language; give that with --source"
            + (f", which is the data file {files[0]} now, or leave --target-adapter out to train both" if files else "")
        )
    if target.task == "translation" and files and source_language is None:
        raise RecipeError(
            f"{target.name} holds translations: give the language that {listed(files)} {'are' if files[1:] else 'is'} translated "
            "into with --source-language, such as --source-language id"
        )
    source_language = source_language or "en"
    given = [*adapters, *([target_adapter] if target_adapter else [])]
    learn_ratio = learn_ratio or target_adapter is not None
    backbone = backbone or _backbone_of(given)
    asked = _how_asked(target_adapter, target.task, prompt)
    sources = [
        read_corpus(
            name,
            resolve_file(name) if name.startswith(DEMO_PREFIX) else Path(name),
            file.parent,
            target.task,
            other_columns or target_columns,
            source_sheet,
            option=SOURCE_COLUMN if other_columns else None,
            skip_unanswered=skip_unanswered,
        )
        for name in files
    ]
    for corpus in sources if target.labels else ():
        check_labels((*target.labels, *corpus.labels), f"{target.name} and {corpus.name}")
    check_shared(target.labels, (label for corpus in sources for label in corpus.labels))
    if target.task == "translation" and asked["prompt"] is None:
        codes = (language, source_language) if sources else (language,)
        words = {code: f"{INTO}{language_name(code)}:" for code in codes}
        asked |= {"prompt": words, "completion": " {target}"}
    sizes = choose_sizes(target, sources, MICRO_DEV if learn_ratio else 0)
    if not source:
        raise RecipeError(
            "there is no source: add --source FILE with examples of a rich language, or --source ADAPTER, trained on them; both "
            f"for the task {target.task}"
        )
    text = _render(
        file,
        target,
        sizes,
        sources,
        language=language,
        source_language=source_language,
        adapters=[_written(place, file.parent) for place in adapters],
        target_adapter=_written(target_adapter, file.parent) if target_adapter else None,
        learn_ratio=learn_ratio,
        asked=asked,
        all_layers=read_how_asked(target_adapter)[1] if target_adapter else target.task == "qa",
        backbone=_written(backbone, file.parent),
        skip_unanswered=skip_unanswered,
    )
    validate(parse(text, str(file)), str(file))
    with reading(file, RecipeError):
        file.parent.mkdir(parents=True, exist_ok=True)
        for corpus in (target, *sources):
            resolve_file(corpus.name, base=file.parent)  # which refuses a name that is found in two places
        with claim(file, wait=False):
            _refuse_existing(file)
            schema = file.with_name(SCHEMA_FILE)
            with suppress(RecipeError), claim(schema, wait=False):  # else another process writes the same
                write_whole(schema, schema_text())
            write_whole(file, text)  # last, since it is what says that all is there
    return file, sizes.splits["train"] + sizes.spare


def _refuse_existing(file: Path) -> None:
    if is_there(file):
        raise RecipeError(f"{file} exists already; remove it, or choose another name with --output")


def _sort_out(source: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell data files from adapters."""
    files = [place for place in source if is_file(Path(place)) or place.startswith(DEMO_PREFIX)]
    adapters = [place for place in source if place not in files]
    for place in adapters:
        if place == EMBEDDED_ADAPTER:
            continue
        hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place) and Path(place).suffix.lower() not in READERS
        if files or not (is_file(Path(place) / CONFIG_FILE) if is_folder(Path(place)) else hub_id):
            raise RecipeError(
                f"source {place} is neither a data file, nor a folder with {CONFIG_FILE}, nor a hub id such as org/name; give "
                "files to train one adapter, or adapters alone"
            )
    return files, adapters


def _how_asked(adapter: str | None, task: str, prompt: str | None) -> dict[str, Any]:
    """The prompt that a given adapter was trained on, and whether it goes through the chat template.

    Raises:
        RecipeError: the adapter does not say it, and it is not given.
    """
    if prompt is not None or adapter is None:
        return {"prompt": prompt and prompt.replace("\\n", "\n"), "completion": None, "chat_template": False}
    answers, _ = read_how_asked(adapter)
    if answers and answers.task not in (None, task):
        raise RecipeError(
            f"adapter {adapter} was trained for the task {answers.task}, and the rows are of the task {task}"
        )
    if answers is None or answers.prompt is None:
        templates = TEMPLATES[task]
        example = json.dumps(templates.get(FALLBACK_LANGUAGE, next(iter(templates.values()))).prompt)
        raise RecipeError(
            f"adapter {adapter} does not say what prompt it was trained on; give it with --prompt, such as --prompt {example}"
        )
    return {"prompt": answers.prompt, "completion": answers.completion, "chat_template": answers.chat_template}


def _written(place: str, folder: Path) -> str:
    return relative(place, folder) if is_folder(Path(place)) else place


def _render(file: Path, target: Corpus, sizes: Sizes, sources: Sequence[Corpus], **facts: Any) -> str:
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
    splits = sizes.splits
    builtin, asked = built_in_template(target.task, facts["language"]), facts["asked"]
    if builtin and asked["prompt"] == builtin.prompt:
        asked["prompt"] = None  # as it is by itself
    # A split takes whole groups, so that a single one would be all dev.
    source_dev = 0 if sizes.one_source_group else min(sizes.source // 10, MOST_SOURCE // 10)
    return environment.get_template("recipe.yaml.j2").render(
        schema_line=SCHEMA_LINE,
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._")[:100] or f"{target.task}-{facts['language']}",
        file=shlex.quote(file.name),
        target=target,
        sizes=splits,
        spare=sizes.spare,
        most_train=MOST_TRAIN,
        sources=sources,
        source_records=sum(len(corpus.records) for corpus in sources),
        source_dev=source_dev,
        source_train=MOST_SOURCE if sizes.source - source_dev > MOST_SOURCE else None,
        source_left=sizes.source - source_dev,
        # Questions: in Swahili 4.7 points of F1 more for `continued` than on `q_proj` and `v_proj`, 8.3 for the merge
        # (`lab/layers.py`). At 1e-4 the first look at the dev rows ended some trainings on 30 to 50 rows, at 3e-5 none.
        rate="3.0e-5" if facts["all_layers"] else "1.0e-4",
        epochs=2 if target.task == "qa" else 3,
        most_tokens=token_limit(target, sources),
        cut_document=CUT_DOCUMENT,
        template=None if builtin or asked["prompt"] else TEMPLATES[target.task][FALLBACK_LANGUAGE],
        separates=_lacks_separator(target, sources),
        embedded_adapter=EMBEDDED_ADAPTER,
        unanswered=sum(corpus.unanswered for corpus in (target, *sources)),
        several_lines=target.several_lines,
        **facts,
    )


def _lacks_separator(target: Corpus, sources: Sequence[Corpus]) -> bool:
    """Whether nothing stands between many a prompt and its answer; conversations end their turns themselves."""
    talks = any(record.messages for corpus in (target, *sources) for record in corpus.records)
    glued = [are_glued(record.fields.get("prompt", ""), record.answer) for record in target.records]
    return not talks and GLUED * sum(glued) > len(glued)


def _backbone_of(adapters: Sequence[str]) -> str:
    """The backbone that all adapters name."""
    names = {str(backbone_of_run(place) or read_backbone(place)) for place in adapters}
    folders = [name for name in names if is_folder(Path(name))]
    # An adapter that was copied states the folder's own name alone.
    if len(folders) == 1 and {Path(name).name for name in names} == {Path(folders[0]).name}:
        names = set(folders)
    if len(names) > 1 or "None" in names:
        raise AdapterError(f"the adapters name the backbones {listed(sorted(names))}; name one with --backbone")
    return names.pop() if names else EMBEDDED_NAME


def token_limit(target: Corpus, sources: Sequence[Corpus]) -> int:
    """The limit of tokens for both languages: it leaves out what is very long, unless too little would be left."""
    roomy = max(corpus.roomy_tokens for corpus in (target, *sources))
    most = min(MOST_TOKENS, roomy)
    left = sum(len(corpus.usable(most)) for corpus in sources)
    if len(target.usable(most)) >= FEWEST and (not sources or left >= FEWEST_SOURCE):
        return most
    return roomy


def choose_sizes(target: Corpus, sources: Sequence[Corpus], micro_dev: int = 0) -> Sizes:
    """Find the largest split sizes that whole groups can fill in any order.

    Args:
        micro_dev: rows that the controller probes.

    Raises:
        DataError: there are too few examples or groups, or the source has too few that may be trained on.
    """
    most = token_limit(target, sources)
    records = target.usable(most)
    if len(records) < FEWEST:
        raise DataError(
            f"{target.name} has {len(records)} examples; at least {FEWEST} are needed for train and test (400 for a "
            "test set as large as the paper's)"
        )
    fewest = math.ceil((micro_dev + FEWEST_TRAIN) * 4 / 3) if micro_dev else FEWEST
    if len(records) < fewest:
        raise DataError(
            f"{target.name} has {len(records)} examples; to learn a prune ratio at least {fewest} are needed, for test, "
            f"{micro_dev} micro-dev rows and {FEWEST_TRAIN} to train on: {fewest - len(records)} are missing"
        )
    source_records = [record for corpus in sources for record in corpus.usable(most)]
    joined = join_groups(keys_with_turns((*records, *source_records)))
    groups, source_groups = by_group(records, joined), by_group(source_records, joined)
    for share in (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5):
        total = int(len(records) * share)
        if total < fewest:
            break
        sizes = _sizes(total, micro_dev)
        held_out = [names for order in range(ORDERS) if (names := _held_out(groups, sizes, order)) is not None]
        if len(held_out) == ORDERS:
            left = [[len(source_groups[name]) for name in source_groups.keys() - names] for names in held_out]
            fewest = min(map(sum, left))
            if sources and fewest < FEWEST_SOURCE:
                raise DataError(
                    f"the source has {len(source_records)} examples, of which {fewest} share no question, context or article "
                    f"with held-out target examples; at least {FEWEST_SOURCE} are needed: give more source data"
                )
            return Sizes(sizes, len(records) - sum(sizes.values()), fewest, any(len(counts) < 2 for counts in left))
    raise DataError(
        f"splits take whole groups of one text, group, id or title, and the {len(records)} examples of {target.name} form "
        f"{len(groups)}, the largest of {max(map(len, groups.values()))}; add examples of other texts, or "
        "name other columns with --column"
    )


def _sizes(examples: int, micro_dev: int = 0) -> dict[str, int]:
    """A quarter for the test, up to the paper's size; all else is for training: no row says when to stop."""
    test = min(PAPER_SIZES["test"], math.ceil(examples / 4))
    probed = {"micro_dev": micro_dev} if micro_dev else {}
    return {"test": test, **probed, "train": min(MOST_TRAIN, examples - test - micro_dev)}


def _held_out(groups: Mapping[str, Sequence[Record]], sizes: Mapping[str, int], order: int) -> set[str] | None:
    """Split the groups in one random order; return those that are held out, None if a split stays short."""
    names = sorted(groups)
    random.Random(order).shuffle(names)
    splits = assign([[name] * len(groups[name]) for name in names], dict(sizes))
    if any(len(splits[name]) < size for name, size in sizes.items()):
        return None
    return {name for split in HELD_OUT for name in splits.get(split, ())}

"""The model card of an adapter: README.md beside it."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from grasp_lora.bench.run_folder import ALL_ROWS, CARD_FILE
from grasp_lora.data.splits import SPLITS
from grasp_lora.data.tasks import FALLBACK_LANGUAGE, TEMPLATES, built_in_template, options_of
from grasp_lora.errors import DataError, RecipeError
from grasp_lora.models.embedded import PUBLIC_NAME
from grasp_lora.models.reading import WEIGHTS_FILE
from grasp_lora.models.settings import EMBEDDED_HUB_ID, EMBEDDED_LICENCE
from grasp_lora.recipes.recipe import TEXTS
from grasp_lora.recipes.text import parse
from grasp_lora.report.delivered import PARTS, delivered_system, made_of
from grasp_lora.report.pages import headline, languages_of, public_name, render, short_code, sizes_of, view_of
from grasp_lora.report.run_record import CorpusFacts, DataRecipe, RunRecord, read_run
from grasp_lora.report.tables import METRIC_NAMES
from grasp_lora.storage.files import write_whole
from grasp_lora.storage.reading import sha256_of
from grasp_lora.text.display import escaped
from grasp_lora.text.names import last_part

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
TAGS = ["lora", "grasp-lora", "adapter-merging", "pruning", "cross-lingual-transfer"]


def write_model_card(run_folder: Path, adapter_folder: Path) -> Path:
    """Write README.md into an adapter folder: what it is, what it was made of, what it scores, how to load and ask it.

    The card names files and models and gives hashes; it holds no path and no text of the data.

    Args:
        run_folder: the run that made the adapter; it may be half-finished.
        adapter_folder: an existing PEFT adapter folder.

    Raises:
        RecipeError: the run folder does not fit (see `write_report`), or the adapter folder is missing.
    """
    record = read_run(run_folder)
    if not adapter_folder.is_dir():
        raise RecipeError(f"There is no adapter folder {adapter_folder}; give the folder of a saved adapter.")
    backbone = public_name(record.run.backbone.name)
    quantised = f", quantised as {record.run.quantise}" if record.run.quantise else ""
    parents = [("Backbone", f"{backbone}{quantised}", record.run.backbone.fingerprint)]
    system, metrics = delivered_system(record), record.metrics
    name = metrics.delivered.name if metrics and metrics.delivered else system
    kind = name.partition("_")[0]
    again = metrics.all_rows.steps if metrics and metrics.all_rows else {}
    sides = PARTS.get(kind, ("source", "target"))
    for side in sides:
        weights = run_folder / side / WEIGHTS_FILE
        if again.get(side):  # so that the one in the run's folder has no part in this one
            parents.append((f"{side.capitalize()} adapter", "trained again on all rows", "–"))
        elif weights.is_file():
            parents.append((f"{side.capitalize()} adapter", f"the run's folder {side}", f"sha256:{sha256_of(weights)}"))
    sources = len(record.recipe.source.adapters)  # which come first
    given = {"source": record.run.parents[:sources], "target": record.run.parents[sources:]}
    trained_on = [side for side in sides if not given[side]]
    if kind in ("continued", "grasp") and "target" not in trained_on:
        trained_on.append("target")
    if kind == "source":
        given["source"] = [one for own, one in zip(record.sources, given["source"], strict=False) if own == name]
    parents += [("Given adapter", one.name, f"sha256:{one.sha256}") for side in sides for one in given[side]]
    corpora = [corpus for side in trained_on if (corpus := getattr(record.recipe.data, side))]
    sides_of = {split: "source" if split.startswith("source") else "target" for split in SPLITS}
    prompt = record.data.report.get("prompt") or _prompt(record.recipe.data)  # earlier runs do not say theirs
    recipe = _public_recipe(record.recipe_text)
    context = view_of(record) | {
        "front_matter": _front_matter(record, backbone, system, corpora),
        "made": made_of(kind, record, given_target=bool(given["target"])),
        "pruned": kind == "grasp",
        "parts": sides,
        "base": _base(record, backbone),
        "base_model_name": backbone,
        "parents": parents,
        "files": _data_names(corpora),
        "languages": languages_of(corpora),
        "sizes": sizes_of(record, [split for split in SPLITS if split == "test" or sides_of[split] in trained_on]),
        "prompt": [escaped(line) for line in prompt.split("\n")] if prompt else [],
        "asked": _literal(_with_dots(prompt or "...")),
        "max_new_tokens": record.recipe.generation.max_new_tokens,
        "stops": [_literal(stop) for stop in record.recipe.generation.stop if stop],
        "chat": record.in_chat,
        "end_of_turn": _literal(end) if (end := record.data.report.get("end_of_turn")) else None,
        "options": options_of(prompt or ""),
        "labels": list(record.data.report.get("labels") or ()),
        "recipe": recipe,
        "hub_name": record.run.name if HUB_ID.fullmatch(record.run.name) else "NAME",
        "fence": "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0)),
    }
    if system == ALL_ROWS:  # whose scores are not those of the final run
        context["headline"] = headline(record, {})
    path = adapter_folder / CARD_FILE
    write_whole(path, render("model_card.md.j2", context))
    return path


def _front_matter(record: RunRecord, backbone: str, system: str, corpora: Sequence[CorpusFacts]) -> str:
    """What the hub reads of a card. It names no local file and no local folder, for which the hub would look among its own."""
    from huggingface_hub import ModelCardData

    run = record.run
    embedded = backbone == PUBLIC_NAME
    given = [short_code(corpus.language) for corpus in reversed(corpora)]
    codes = [code for code in given if re.fullmatch(r"[a-z]{2,3}", code)]
    data_sets = [corpus.hub for corpus in reversed(corpora) if corpus.hub and HUB_ID.fullmatch(corpus.hub)]
    card = ModelCardData(
        model_name=escaped(run.name),
        library_name="peft",
        base_model=EMBEDDED_HUB_ID if embedded else backbone if run.backbone.commit else None,
        license=EMBEDDED_LICENCE if embedded else None,
        language=list(dict.fromkeys(codes)) or None,
        datasets=list(dict.fromkeys(data_sets)) or None,
        pipeline_tag="text-generation",
        tags=TAGS,
        eval_results=_results(record, system) or None,
    )
    return card.to_yaml() + "\n"


def _results(record: RunRecord, system: str) -> list[Any]:
    """The scores of the adapter that was handed over, one a metric, with the number of test rows."""
    from huggingface_hub import EvalResult

    metrics, target = record.metrics, record.recipe.data.target
    if metrics is None or system not in metrics.systems:
        return []
    scores = metrics.systems[system]
    values = {"loss": scores.test_loss} | dict(scores.metrics)
    names = {"loss": "Test loss, nats per token of the answer"} | METRIC_NAMES
    on_hub = target.hub is not None and HUB_ID.fullmatch(target.hub)
    rows = f"{metrics.test_examples} test rows"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(target.hub) if on_hub else "local",
            dataset_name=f"{target.hub}, {rows}" if on_hub else f"{rows} of the run",
            dataset_split="test",
            dataset_args={"test_rows": metrics.test_examples},
            metric_type=name,
            metric_name=names.get(name, name),
            metric_value=round(value, 4),
        )
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    ]


def _base(record: RunRecord, backbone: str) -> dict[str, Any]:
    """How Python loads the model that the adapter was trained on."""
    run, options = record.run, []
    if run.backbone.commit:
        options.append(f"revision={_literal(run.backbone.commit)}")
    if record.recipe.backbone.trust_remote_code:
        options.append("trust_remote_code=True")
    return {
        "embedded": backbone == PUBLIC_NAME,
        "local": run.backbone.commit is None,
        "name": _literal(backbone),
        "options": "".join(f", {option}" for option in options),
        "dtype": f", dtype={_literal(run.dtype)}" if run.dtype else "",
    }


def _with_dots(template: str) -> str:
    """A prompt with dots in the place of its fields; two braces stand for one, as `str.format` has it."""
    parts = Formatter().parse(template)
    return "".join(text + ("" if field is None else "...") for text, field, _, _ in parts)


def _literal(text: str) -> str:
    """A text as Python code on one line, with its control characters as escapes."""
    return escaped(json.dumps(text, ensure_ascii=False))


def _public_recipe(text: str) -> str:
    """The recipe as YAML, of each path only the last part."""
    content = _without_places(parse(text, "it"))
    dumped = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=math.inf)
    return "\n".join(map(escaped, dumped.split("\n")))


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: part if key in TEXTS else _without_places(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_places(part) for part in value]
    if not isinstance(value, str) or not re.search(r"[\\/]", value) or HUB_ID.fullmatch(value):
        return value
    return last_part(value)


def _prompt(data: DataRecipe) -> str | None:
    """The template of the prompts that the adapter was trained on; None where the recipe does not say."""
    prompt = data.prompt if data.target.prompt is None else data.target.prompt
    if prompt is not None:
        return prompt
    try:
        built_in = built_in_template(data.task, data.target.language)
        return (built_in or TEMPLATES[data.task][FALLBACK_LANGUAGE]).prompt
    except (KeyError, DataError):
        return None


def _data_names(corpora: Sequence[CorpusFacts]) -> list[str]:
    """Names of data sets and files, without their folders."""
    names: list[str] = []
    for corpus in corpora:
        names += [public_name(corpus.hub)] if corpus.hub else []
        names += [last_part(file) for file in corpus.all_files]
    return list(dict.fromkeys(names))

"""The model card of an adapter: README.md beside it, with what the hub reads of it and lines of Python that load it.

It names files and models and gives hashes; it holds no path and no text of the data.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from grasp_lora.data.data_settings import CorpusSettings
from grasp_lora.data.splits import SPLITS
from grasp_lora.data.tasks import options_of
from grasp_lora.engine.run_folder import CARD_FILE, FINAL_FOLDER, TRAINED, Run
from grasp_lora.evaluation.metrics import METRICS
from grasp_lora.models.adapter_files import WEIGHTS_FILE
from grasp_lora.models.embedded import PUBLIC_NAME
from grasp_lora.models.model_settings import EMBEDDED_HUB_ID, EMBEDDED_LICENCE
from grasp_lora.recipes.recipe import TEXTS
from grasp_lora.report.delivered import discarded, made_of, upload_command
from grasp_lora.report.pages import languages_of, public_name, render, sizes_of, view_of
from grasp_lora.storage.reading import sha256_of
from grasp_lora.storage.writing import write_whole
from grasp_lora.text.display import escaped
from grasp_lora.text.languages import language_code
from grasp_lora.text.names import last_part

SIDES = ("source", "target")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
TAGS = ["lora", "grasp-lora"]  # and what was done


def write_model_card(run: Run, folder: Path, adapter_folder: Path) -> Path:
    """Write README.md into an adapter folder: what it is, what it was made of, what it scores, how to load and ask it.

    The adapters in the folder of the run are named with their hashes.
    """
    report, generation = run.data.report, run.recipe.generation
    name, sources = run.metrics.delivered.name, len(run.recipe.source.adapters)  # which come first
    borrowed = {"source": run.info.parents[:sources], "target": run.info.parents[sources:]}
    trained_on = [*["source"] * (not borrowed["source"]), "target"]
    corpora = [corpus for side in trained_on if (corpus := getattr(run.recipe.data, side))]
    sides_of = {split: "source" if split.startswith("source") else "target" for split in SPLITS}
    backbone, prompt, recipe = public_name(run.info.backbone.name), report["prompt"], _public_recipe(run)
    view = view_of(run, folder)
    context = view | {
        "front_matter": _front_matter(run, backbone, name, corpora),
        "made": made_of(name, run),
        "is": (view["verdict"] or "").replace("Take this adapter", "It is"),
        "pruned": name == "grasp",
        "discarded": [TRAINED[part] for part in (*SIDES, FINAL_FOLDER) if discarded(run, part)],
        "base": _base(run, backbone),
        "base_model_name": backbone,
        "parents": _parents(run, folder, backbone, borrowed),
        "files": _data_names(corpora),
        "languages": languages_of(corpora) if corpora else "",
        "sizes": sizes_of(run, [split for split in SPLITS if split == "test" or sides_of[split] in trained_on]),
        "prompt": [escaped(line) for line in prompt.split("\n")],
        "asked": _literal(_with_dots(prompt)),
        "max_new_tokens": generation.max_new_tokens,
        "stops": [_literal(stop) for stop in generation.stop if stop],
        "chat": report["chat_template"],
        "end_of_turn": _literal(report["end_of_turn"]) if report.get("end_of_turn") else None,
        "options": options_of(prompt),
        "labels": list(report.get("labels") or ()),
        "recipe": recipe,
        "fence": "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0)),
        "upload": upload_command(),
    }
    write_whole(adapter_folder / CARD_FILE, render("model_card.md.j2", context))
    return adapter_folder / CARD_FILE


def _parents(run: Run, folder: Path, backbone: str, borrowed: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What the adapter was made of: part, name and hash."""
    quantised = f", quantised as {run.info.quantise}" if run.info.quantise else ""
    parents = [("Backbone", f"{backbone}{quantised}", run.info.backbone.fingerprint)]
    for side in SIDES:
        weights = folder / side / WEIGHTS_FILE
        if not borrowed[side] and weights.is_file():
            parents.append((f"{side.capitalize()} adapter", f"the run's folder {side}", f"sha256:{sha256_of(weights)}"))
    return parents + [
        ("Given adapter", adapter.name, f"sha256:{adapter.sha256}") for side in SIDES for adapter in borrowed[side]
    ]


def _front_matter(run: Run, backbone: str, system: str, corpora: Sequence[CorpusSettings]) -> str:
    """What the hub reads of a card. It names no local file and no local folder, for which the hub would look among its own."""
    embedded = backbone == PUBLIC_NAME
    codes = [language_code(corpus.language) for corpus in reversed(corpora)]
    data_sets = [corpus.hub[0] for corpus in reversed(corpora) if corpus.hub and HUB_ID.fullmatch(corpus.hub[0])]
    merged = system != "continued"
    happened = {
        "adapter-merging": merged,
        "pruning": merged and run.metrics.prune_ratio > 0.0,
        "cross-lingual-transfer": len(set(codes)) > 1,
    }
    card = ModelCardData(
        model_name=run.info.name,
        library_name="peft",
        base_model=EMBEDDED_HUB_ID if embedded else backbone if run.info.backbone.commit else None,
        license=EMBEDDED_LICENCE if embedded else None,
        language=list(dict.fromkeys(codes)) or None,
        datasets=list(dict.fromkeys(data_sets)) or None,
        pipeline_tag="text-generation",
        tags=[*TAGS, *(tag for tag, done in happened.items() if done)],
        eval_results=_results(run, system) or None,
    )
    return card.to_yaml() + "\n"


def _results(run: Run, system: str) -> list[EvalResult]:
    """The scores of the adapter that was handed over, one a metric, with the number of test rows."""
    scores, count, hub = run.metrics.systems[system], run.metrics.test_examples, "".join(run.recipe.data.target.hub[:1])
    names = {"loss": "Test loss, nats per token of the answer"} | {
        name: metric.title for name, metric in METRICS.items()
    }
    rows, on_hub = f"{count} test rows", HUB_ID.fullmatch(hub)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=hub if on_hub else "local",
            dataset_name=f"{hub}, {rows}" if on_hub else f"{rows} of the run",
            dataset_split="test",
            dataset_args={"test_rows": count},
            metric_type=name,
            metric_name=names.get(name, name),
            metric_value=round(value, 4),
        )
        for name, value in {"loss": scores.test_loss, **scores.metrics}.items()
        if value is not None and math.isfinite(value)
    ]


def _base(run: Run, backbone: str) -> dict[str, Any]:
    """How Python loads the model that the adapter was trained on."""
    commit, options = run.info.backbone.commit, []
    if commit:
        options.append(f"revision={_literal(commit)}")
    if run.recipe.backbone.trust_remote_code:
        options.append("trust_remote_code=True")
    return {
        "embedded": backbone == PUBLIC_NAME,
        "local": commit is None,
        "name": _literal(backbone),
        "options": "".join(f", {option}" for option in options),
        "dtype": f", dtype={_literal(run.info.dtype)}",
    }


def _with_dots(template: str) -> str:
    """A prompt with dots in the place of its fields; two braces stand for one, as `str.format` has it."""
    parts = Formatter().parse(template)
    return "".join(text + ("" if field is None else "...") for text, field, _, _ in parts)


def _literal(text: str) -> str:
    """A text as Python code on one line, with its control characters as escapes."""
    return escaped(json.dumps(text, ensure_ascii=False))


def _public_recipe(run: Run) -> str:
    """The recipe as YAML, of each path only the last part."""
    content = _without_places(run.recipe.model_dump(mode="json", exclude={"data": {"root"}}))
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


def _data_names(corpora: Sequence[CorpusSettings]) -> list[str]:
    """Names of data sets and files, without their folders."""
    names: list[str] = []
    for corpus in corpora:
        names += [public_name(name) for name in corpus.hub[:1]]
        names += map(last_part, corpus.all_files)
    return list(dict.fromkeys(names))

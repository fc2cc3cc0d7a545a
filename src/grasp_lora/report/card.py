"""The model card of an adapter: README.md beside it."""

import hashlib
import json
import re
from pathlib import Path

import yaml

from grasp_lora.bench.run_folder import CARD_FILE
from grasp_lora.data.tasks import FALLBACK_LANGUAGE, TEMPLATES, built_in_template
from grasp_lora.errors import DataError, RecipeError
from grasp_lora.models.reading import WEIGHTS_FILE
from grasp_lora.report.delivered import MADE, PARTS, delivered_system
from grasp_lora.report.pages import public_name, render, view_of
from grasp_lora.report.run_record import DataRecipe, read_run
from grasp_lora.storage.files import write_whole
from grasp_lora.text.display import escaped


def write_model_card(run_folder: Path, adapter_folder: Path) -> Path:
    """Write README.md into an adapter folder: what it is, what it was made of, what it scores, how to load it.

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
    base_model = backbone.split(" (")[0]  # what the hub knows: without a remark on the quantisation
    front = {
        "library_name": "peft",
        "base_model": base_model,
        "tags": ["lora", "grasp-lora", "adapter-merging", "pruning", "cross-lingual-transfer"],
        "pipeline_tag": "text-generation",
    }
    language = record.recipe.data.target.language
    if re.fullmatch(r"[a-z]{2,3}", language):
        front["language"] = [language]
    parents = [("Backbone", backbone, record.run.backbone.fingerprint)]
    system = delivered_system(record)
    kind = system.partition("_")[0]
    sides = PARTS.get(kind, ("source", "target"))
    for side in sides:
        weights = run_folder / side / WEIGHTS_FILE
        if weights.is_file():
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
            parents.append((f"{side.capitalize()} adapter", f"the run's folder {side}", f"sha256:{digest}"))
    sources = len(record.recipe.source.adapters)  # which come first
    given = {"source": record.run.parents[:sources], "target": record.run.parents[sources:]}
    parents += [("Given adapter", one.name, f"sha256:{one.sha256}") for side in sides for one in given[side]]
    context = view_of(record) | {
        "front_matter": yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        "made": MADE[kind],
        "pruned": system == "grasp",
        "base_model": json.dumps(base_model),
        "base_model_name": backbone,
        "parents": parents,
        "files": _data_names(record.recipe.data),
        "prompt": _prompt(record.recipe.data),
        "chat": record.in_chat,
    }
    path = adapter_folder / CARD_FILE
    write_whole(path, render("model_card.md.j2", context))
    return path


def _prompt(data: DataRecipe) -> list[str]:
    """The lines of the template of the prompts that the adapter was trained on; none where the recipe does not say."""
    prompt = data.prompt if data.target.prompt is None else data.target.prompt
    if prompt is None:
        try:
            built_in = built_in_template(data.task, data.target.language)
            prompt = (built_in or TEMPLATES[data.task][FALLBACK_LANGUAGE]).prompt
        except (KeyError, DataError):
            return []
    return [escaped(line) for line in prompt.split("\n")]


def _data_names(data: DataRecipe) -> list[str]:
    """Names of the data sets and files in the recipe, without their folders."""
    names: list[str] = []
    for corpus in data.corpora:
        names += [public_name(corpus.hub)] if corpus.hub else []
        names += [re.split(r"[\\/]", file)[-1] for file in corpus.all_files]
    return list(dict.fromkeys(names))

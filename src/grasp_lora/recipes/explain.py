"""What is wrong with a recipe, in one line that names the field, what arrived and what is allowed."""

import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from datetime import date

from pydantic import ValidationError

from grasp_lora.method.search import POLICIES
from grasp_lora.recipes.builtin import recipe_keys
from grasp_lora.recipes.gone import GONE_KEYS
from grasp_lora.text.display import escaped, one_line, quoted

ELSEWHERE_SHOWN = 4  # of the keys that end as an unknown one does
# What PEFT, transformers, TRL, axolotl and LLaMA-Factory call what has another name here.
SYNONYMS = {
    "adapter_name_or_path": "adapters",
    "base_model": "backbone.name",
    "block_size": "max_tokens",
    "cutoff_len": "max_tokens",
    "dataset": "data.target.files",
    "dataset_name": "data.target.hub",
    "datasets": "data.target.files",
    "early_stopping_patience": "training.patience",
    "eval_dataset": "data.target.dev_files",
    "eval_steps": "training.evaluate_every",
    "gradient_accumulation_steps": "training.accumulation",
    "lang": "language",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_decay",
    "lr_scheduler_type": "training.lr_decay",
    "max_length": "max_tokens",
    "max_seq_length": "max_tokens",
    "micro_batch_size": "training.batch_size",
    "model": "backbone.name",
    "model_name_or_path": "backbone.name",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "pruning_ratio": "final.prune_ratio",
    "r": "lora.rank",
    "save_steps": "save_every",
    "sequence_len": "max_tokens",
    "sparsity": "final.prune_ratio",
    "template": "chat_template",
    "torch_dtype": "backbone.dtype",
    "train_batch_size": "training.batch_size",
    "train_file": "data.target.train_files",
    "use_rslora": "lora.rslora",
    "validation_file": "data.target.dev_files",
}
NO_KEY = {  # what people look for that is no key of a recipe
    "load_in_4bit": "set backbone.quantise to nf4; a backbone that was saved quantised is loaded as it is",
    "load_in_8bit": "set backbone.quantise to int8; a backbone that was saved quantised is loaded as it is",
    "output_dir": "give the folder on the command line: --output FOLDER",
    "warmup_ratio": "there is no warm-up; lower learning_rate",
    "warmup_steps": "there is no warm-up; lower learning_rate",
    "wandb_project": "trackers read their own environment; name the tracker in report_to",
}
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_PLAIN_WORDS = {  # of pydantic's error types, for those who do not know Python
    "string_pattern_mismatch": "use Latin letters, digits, '.', '_' and '-' only, and begin with a letter or digit",
    "tuple_type": "must be a list, such as [first, second]",
    "dataclass_type": "must be a section of keys and values",
    "model_type": "must be a section of keys and values",
    "dict_type": "must be a section of keys and values",
    "string_type": "must be a text",
}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}  # as those types begin
_PLAIN_ITEMS = re.compile(r"[\w./, -]{1,80}")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?) ?%")


def explain(error: ValidationError, keys: Sequence[str] = ()) -> str:
    """The first problem in one line, an unknown key before all else, with the nearest one that exists.

    Args:
        error: of pydantic.
        keys: what may be set, by dotted path; empty takes those of a recipe.
    """
    problem = min(error.errors(include_url=False), key=lambda one: one["type"] not in _UNKNOWN)
    place = [str(part) for part in problem["loc"] if not str(part).startswith("function-")]
    path = ".".join(place)
    others = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] in _UNKNOWN and path in GONE_KEYS and not keys:
        return f"{path} is gone: {GONE_KEYS[path]}{others}"
    if problem["type"] in _UNKNOWN:
        return f"unknown key {quoted(path)}; {_hint(place, keys or recipe_keys())}{others}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{quoted(path)} is missing{others}"
    message = one_line(_PLAIN_WORDS.get(problem["type"], problem["msg"].removeprefix("Value error, ")))
    if problem["type"] == "value_error":
        return f"{escaped(path)}: {message}{others}" if path else f"{message}{others}"
    arrived = problem["input"]
    value = arrived if isinstance(arrived, date) else quoted(arrived)
    if not keys and (wanted := _KINDS.get(problem["type"].partition("_")[0])):  # settings in Python are Python's
        share = _PERCENT.fullmatch(arrived) if isinstance(arrived, str) and wanted == "a number" else None
        hint = f"; for {share[1]} % write {float(share[1]) / 100:g}" if share else ""
        return f"{escaped(path)} is {value}; it must be {wanted}{hint}{others}"
    shown = "" if isinstance(arrived, dict | list) else f" (it is {value})"
    if problem["type"] == "string_type" and isinstance(arrived, bool | int | float | date):
        shown += "; put it in quotes"  # YAML reads the language code `no` as false
    if problem["type"] == "tuple_type" and not keys and _PLAIN_ITEMS.fullmatch(str(arrived)):
        shown += f"; write [{arrived}], as in --set {shlex.quote(f'{path}=[{arrived}]')}"
    return f"{escaped(path)}: {message[0].lower()}{message[1:]}{shown}{others}"


def _hint(place: list[str], keys: Sequence[str]) -> str:
    """What may have been meant by an unknown key: the same name elsewhere, another tool's word for it, or a slip."""
    *section, name = place
    if name in NO_KEY:
        return NO_KEY[name]
    inside = ".".join([*section, ""])
    known = [key.removeprefix(inside) for key in keys if key.startswith(inside) and "." not in key[len(inside) :]]
    wanted = SYNONYMS.get(name, name)
    home, _, last = wanted.rpartition(".")
    if last in known and last != name and f".{'.'.join(section)}".endswith(f".{home}" if home else ""):
        return f"did you mean {last!r}?"
    if ".".join(place) in keys:  # a setting of another kind
        kinds = [kind for kind, policy in POLICIES.items() if name in {one.name for one in fields(policy)}]
        return f"only a policy of kind {' or '.join(kinds)} has it; set kind, or leave it out"
    if wanted == name and section and (near := difflib.get_close_matches(name, known, n=1, cutoff=0.85)):
        return f"did you mean {near[0]!r}?"
    ends = (".".join(["", *place]), f".{wanted}")  # the whole of what was written counts for more than its last part
    there = next((found for end in ends if (found := [key for key in keys if f".{key}".endswith(end)])), [])
    inner = [key for key in there if key.startswith(inside)]
    near = inner or there or [inside + key for key in difflib.get_close_matches(name, known, n=1)]
    shown = [repr(key) for key in near[:ELSEWHERE_SHOWN]]
    return f"did you mean {' or '.join(shown)}?" if near else f"known here: {', '.join(known)}"

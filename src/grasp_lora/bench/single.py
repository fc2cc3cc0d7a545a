"""The single steps of the command line on folders: merge, learn, finetune, evaluate, predict."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp_lora.bench.session import Session, ratio_record
from grasp_lora.data.encode import prompt_ids
from grasp_lora.errors import AdapterError, DataError, GraspError, RecipeError
from grasp_lora.method.merging import MergeSettings
from grasp_lora.method.merging import merge as merge_weights
from grasp_lora.method.rounds import RatioEstimate
from grasp_lora.models.adapters import LoadedAdapter, attached, check_fits, read_adapter, save_adapter
from grasp_lora.models.backbone import EMBEDDED_HUB_ID, EMBEDDED_NAME, Backbone, BackboneSettings, load_backbone
from grasp_lora.models.generation import GenerationSettings, generate
from grasp_lora.storage.files import appear, clear_write_errors, write_json, write_jsonl
from grasp_lora.text.display import SURROGATES

if TYPE_CHECKING:
    from grasp_lora.training.finetune import FineTuneResult


def merge_folders(
    places: Sequence[str],
    output: Path,
    backbone: str | None,
    rule: str,
    weights: Sequence[float] | None,
    rank: int | None,
    density: float,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Merge adapters from folders or hub ids into a new folder; return one line on the result.

    Args:
        places: PEFT adapters, folders or hub ids.
        output: a folder that does not exist or is empty.
        backbone, revision, trust_remote_code: as in a recipe's `backbone`; None takes the one that the first adapter names.
        rule, weights, rank, density: see `MergeSettings`.

    Raises:
        GraspError: an adapter, the rule's settings or the output folder does not fit.
    """
    try:
        settings = MergeSettings(rule, tuple(weights) if weights else None, rank, density)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    refuse_existing(output)
    adapters = [read_adapter(place) for place in places]
    merged = merge_weights([adapter.weights for adapter in adapters], settings)
    loaded = backbone_of(adapters[0], backbone, "cpu", revision=revision, trust_remote_code=trust_remote_code)
    for adapter in adapters:
        check_fits(adapter, loaded.model, backbone_name=loaded.name, fingerprint=loaded.fingerprint)
    answers = [adapter.info.get("answers") for adapter in adapters]
    alike = all(one == answers[0] for one in answers)

    def write(draft: Path) -> None:
        save_adapter(
            draft,
            merged,
            loaded.model,
            backbone_name=adapters[0].base_model or loaded.name,
            fingerprint=loaded.fingerprint,
            dropout=0.0,
            answers=answers[0] if alike else None,
        )

    appear(output, write)
    ranks = sorted({pair.rank for pair in merged.values()})
    line = f"merged {len(adapters)} adapters by {rule!r}: {len(merged)} modules, ranks {ranks} -> {output}"
    if not alike:
        line += "; they were trained to answer in different ways, so tell predict: --stop, --max-new-tokens, --chat"
    return line


def learn_folder(session: Session, place: str, output: Path) -> RatioEstimate:
    """Run the controller on an adapter; write its records, ratio.json and the trained adapter."""
    refuse_existing(output)
    session.prepare(parents=False)
    adapter = session.read(_from_here(place))
    with clear_write_errors(output, goes_on=False):
        learned = session.learn_ratio(adapter.weights, output)
        write_json(output / "ratio.json", ratio_record(learned.estimate, learned.last_committed))
        session.save(output / "adapter", learned.adapter)
    return learned.estimate


def finetune_folder(session: Session, place: str, prune_ratio: float, output: Path) -> "FineTuneResult":
    """Prune an adapter at a ratio and fine-tune it; write the adapter, its history and its sparsity."""
    if not 0.0 <= prune_ratio <= 1.0:
        raise RecipeError(f"the prune ratio is {prune_ratio}; it must be a fraction in [0, 1]")
    refuse_existing(output)
    session.prepare(parents=False)
    adapter = session.read(_from_here(place))
    with clear_write_errors(output, goes_on=False):
        weights, result, rows = session.finetune_pruned(adapter.weights, prune_ratio, output)
        write_json(output / "sparsity.json", rows)
        session.save(output, weights)
    return result


def evaluate_folders(session: Session, places: Sequence[str], output: Path | None) -> dict[str, Any]:
    """Measure adapters on dev and test; return a table as `metrics.json` holds it, and write it with the predictions."""
    if output is not None:
        refuse_existing(output)
    session.prepare(parents=False)
    adapters = [session.read(_from_here(place)) for place in places]
    systems, signatures = {}, {}
    for name, adapter in zip(_names(places, adapters), adapters, strict=True):
        evaluation = session.evaluate(adapter.weights)
        systems[name] = {
            "dev_loss": evaluation.dev_loss,
            "test_loss": evaluation.test_loss,
            "metrics": {metric: entry.value for metric, entry in evaluation.scores.items()},
        }
        signatures = {metric: entry.signature for metric, entry in evaluation.scores.items()}
        if output is not None:
            with clear_write_errors(output, goes_on=False):
                write_jsonl(output / f"{name.replace('/', '--')}.jsonl", evaluation.rows(session.splits.test))
    table = {"systems": systems, "signatures": signatures, "test_examples": len(session.splits.test)}
    if output is not None:
        with clear_write_errors(output, goes_on=False):
            write_json(output / "metrics.json", table)
    return table


def predict_texts(
    place: str,
    prompts: Sequence[str],
    backbone: str | None,
    device: str,
    *,
    max_new_tokens: int | None = None,
    stop: Sequence[str] | None = None,
    chat: bool | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[str]:
    """Answer prompts with an adapter on its backbone, greedily.

    Args:
        place: PEFT adapter, a folder or a hub id.
        prompts: whole prompts, as the adapter was trained on; with `chat` what the user says.
        backbone, revision, trust_remote_code: as in a recipe's `backbone`; None takes the one that the adapter names.
        device: auto, cpu or cuda.
        max_new_tokens, stop, chat: None takes what the adapter was trained with, as it says itself, else 64 tokens, the end of
            the line and plain prompts.

    Raises:
        GraspError: a prompt is empty or there is none, the adapter does not fit the backbone, or the tokenizer has no chat
            template.
    """
    if not prompts:
        raise DataError("there are no prompts; give them as arguments or one a line on standard input")
    if empty := [number for number, prompt in enumerate(prompts, start=1) if not prompt.strip()]:
        raise DataError(f"prompt {empty[0]} is empty; give the adapter something to answer")
    if broken := [number for number, prompt in enumerate(prompts, start=1) if SURROGATES.search(prompt)]:
        raise DataError(
            f"prompt {broken[0]} is no valid text: it has half of a surrogate pair, or was not in UTF-8; give it in UTF-8"
        )
    adapter = read_adapter(place)
    own = {"max_new_tokens": 64, "stop": ["\n"], "chat_template": False} | adapter.info.get("answers", {})
    try:
        settings = GenerationSettings(
            max_new_tokens=own["max_new_tokens"] if max_new_tokens is None else max_new_tokens,
            stop=tuple(own["stop"] if stop is None else stop),
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
    loaded = backbone_of(adapter, backbone, device, revision=revision, trust_remote_code=trust_remote_code)
    check_fits(adapter, loaded.model, backbone_name=loaded.name, fingerprint=loaded.fingerprint)
    ids = prompt_ids(loaded.tokenizer, prompts, own["chat_template"] if chat is None else chat)
    with attached(loaded.model, adapter.weights) as model:
        return generate(model, loaded.tokenizer, ids, settings)


def _from_here(place: str) -> str | Path:
    """A folder that the command line names starts from the working folder, not from that of the recipe."""
    return Path(place).resolve() if Path(place).is_dir() else place


def _names(places: Sequence[str], adapters: Sequence[LoadedAdapter]) -> list[str]:
    """Names of adapters for tables and files: their own, or the places if two are called alike."""
    names = [adapter.name for adapter in adapters]
    return names if len(set(names)) == len(names) else list(places)


def backbone_of(
    adapter: LoadedAdapter,
    named: str | None,
    device: str,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Backbone:
    """Load the backbone of an adapter: the one given by the user, or else the one that the adapter names.

    Raises:
        GraspError: there is no name, a setting is not allowed, or the backbone cannot be loaded.
    """
    name = named or adapter.base_model
    if not name:
        raise AdapterError(f"adapter {adapter.name} does not name its base model; give it with --backbone")
    try:
        settings = BackboneSettings(
            EMBEDDED_NAME if name == EMBEDDED_HUB_ID else name,
            dtype=dtype,  # type: ignore[arg-type]
            device=device,  # type: ignore[arg-type]
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
    try:
        return load_backbone(settings)
    except GraspError as error:
        if named:
            raise
        raise GraspError(f"{error} (adapter {adapter.name} names this backbone; --backbone takes another)") from error


def refuse_existing(output: Path) -> None:
    """Check that a folder for a result is not there yet, or empty, and that it can be written.

    Raises:
        RecipeError: it holds something, is a file, or cannot be written.
    """
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise RecipeError(f"{output} exists and is not an empty folder; choose another with --output")
        there = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    except OSError as error:
        raise RecipeError(f"{output} cannot be made ({error.strerror}); choose another with --output") from error
    if not there.is_dir():
        raise RecipeError(f"{output} cannot be made ({there.name} is a file); choose another with --output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError(f"{output} cannot be made (no permission); choose another with --output")

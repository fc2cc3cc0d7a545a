"""Work on adapters in folders, without a run around it: merge, evaluate."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from grasp_lora.engine.check import check, check_seen
from grasp_lora.engine.run_folder import SystemScores
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps, given_adapter
from grasp_lora.engine.store import Store
from grasp_lora.method.merging import MergeSettings
from grasp_lora.method.merging import merge as merge_weights
from grasp_lora.models.adapter_files import Answers, LoadedAdapter, read_adapter
from grasp_lora.models.adapters import check_fits, save_adapter
from grasp_lora.models.backbone import backbone_of
from grasp_lora.recipes.load import backbone_of_run
from grasp_lora.storage.claims import new_folder, refuse_existing
from grasp_lora.storage.reading import is_folder
from grasp_lora.storage.writing import clear_write_errors, write_json, write_jsonl

logger = logging.getLogger(__name__)


def merge_folders(
    places: Sequence[str],
    output: Path,
    settings: MergeSettings,
    backbone: str | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Merge adapters from folders or hub ids into a new folder; return one line on the result.

    Args:
        places: PEFT adapters, folders or hub ids.
        output: a folder that does not exist or is empty.
        settings: rule, weights, rank and density.
        backbone, revision, trust_remote_code: as in a recipe's `backbone`; None takes the one that the first adapter names.

    Raises:
        GraspError: an adapter or the output folder does not fit.
    """
    refuse_existing(output)
    adapters = [read_adapter(place) for place in places]
    merged = merge_weights([adapter.weights for adapter in adapters], settings).together()
    backbone = backbone or backbone_of_run(places[0])
    loaded = backbone_of(adapters[0], backbone, "cpu", revision=revision, trust_remote_code=trust_remote_code)
    for adapter in adapters:
        check_fits(adapter, loaded)
    answers = [adapter.info.answers for adapter in adapters]
    labels = any(how.labels for how in answers if how)
    reworded = len({how.prompt for how in answers if how}) > 1
    longest = max((how.max_new_tokens for how in answers if how), default=0)  # a longer answer is no other one
    if reworded:  # such as prompts in two languages, which answer in one way
        answers = [how and Answers(longest, how.stop, how.chat_template) for how in answers]
    else:  # columns are of files, not of the adapter
        answers = [how and replace(how, columns={}, max_new_tokens=longest) for how in answers]
    alike = all(how == answers[0] for how in answers)
    dtypes = {adapter.info.backbone_dtype for adapter in adapters}
    with new_folder(output) as draft:
        save_adapter(
            draft,
            merged,
            loaded.model,
            backbone_name=adapters[0].base_model or loaded.base_model,
            fingerprint=loaded.fingerprint,
            dropout=0.0,
            answers=answers[0] if alike else None,
            quantise=loaded.quantise,
            dtype=dtypes.pop() if len(dtypes) == 1 else None,
            embedded=loaded.is_embedded,
            revision=loaded.revision,
            rows={row for adapter in adapters for row in adapter.info.rows},
        )
    ranks = sorted({pair.rank for pair in merged.values()})
    line = f"merged {len(adapters)} adapters by {settings.rule!r}: {len(merged)} modules, ranks {ranks} -> {output}"
    if not alike:
        line += "; they were trained to answer in different ways, so tell predict: --stop, --max-new-tokens, --chat"
    if reworded or not alike:
        line += "; their prompts are worded in different ways" if reworded else ""
        line += "; so predict takes whole prompts" + (" and writes any text, not one of their labels" if labels else "")
    return line


def evaluate_folders(
    session: Session, places: Sequence[str], output: Path | None
) -> tuple[dict[str, SystemScores], dict[str, str]]:
    """Measure adapters on dev and test, and write scores and predictions into a folder, if given.

    Returns:
        The scores of each adapter, and how each metric was computed.

    Raises:
        GraspError: the recipe, the data, an adapter or the output folder does not fit, or the temporary folder cannot be written.
    """
    if output is not None:
        refuse_existing(output)
    check(session, parents=False)
    adapters = [session.read(_from_here(place)) for place in places]
    for adapter in adapters:
        check_seen(session, adapter)
    with _scratch() as scratch, nullcontext() if output is None else new_folder(output) as draft:
        steps = Steps(session, Store(scratch))
        measured = {
            name: steps.measure(given_adapter(adapter))
            for name, adapter in zip(_names(places, adapters), adapters, strict=True)
        }
        systems = {name: SystemScores.of(system) for name, system in measured.items()}
        signatures = {name: score.signature for system in measured.values() for name, score in system.metrics.items()}
        if draft is not None:
            for name, system in measured.items():
                rows = [asdict(row) for row in system.predictions(session.splits.test)]
                write_jsonl(draft / f"{name.replace('/', '--')}.jsonl", rows)
            content = {"systems": {name: asdict(scores) for name, scores in systems.items()}, "signatures": signatures}
            write_json(draft / "metrics.json", content | {"test_examples": len(session.splits.test)})
    return systems, signatures


@contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder; where it is full that is one line."""
    with tempfile.TemporaryDirectory() as name, clear_write_errors(Path(name)):
        yield Path(name)


def _from_here(place: str) -> str | Path:
    """A folder that the command line names starts from the working folder, not from that of the recipe."""
    return Path(place).resolve() if is_folder(Path(place)) else place


def _names(places: Sequence[str], adapters: Sequence[LoadedAdapter]) -> list[str]:
    """Names of adapters for tables and files: their own, or the places if two are called alike."""
    names = [adapter.name for adapter in adapters]
    return names if len(set(names)) == len(names) else list(places)

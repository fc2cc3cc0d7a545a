"""Merge adapters in folders, without a run around it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from grasp_lora.method.merging import MergeSettings
from grasp_lora.method.merging import merge as merge_weights
from grasp_lora.models.adapter_files import Answers, read_adapter
from grasp_lora.models.adapters import check_fits, save_adapter
from grasp_lora.models.backbone import backbone_of
from grasp_lora.recipes.load import backbone_of_run
from grasp_lora.storage.claims import new_folder, refuse_existing


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
        output: a folder that does not exist or is empty.
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

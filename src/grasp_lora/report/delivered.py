"""What the end of a run says: which adapter to take, why, and how to use it."""

import shlex
from pathlib import Path

from grasp_lora.bench.run_folder import ADAPTER_FOLDER, PROMPT_FILE, Delivered
from grasp_lora.report.run_record import RunRecord

MADE = {
    "continued": "a source adapter was trained on in the target language",
    "source": "it is the source adapter as it is, which no adapter of the run was shown to better",
    "target": "it was trained on the target data alone",
    "merged": "a source and a target adapter were merged, and nothing was trained after that",
    "grasp": "a source and a target adapter were merged, a share of the merge was pruned, and the rest was fine-tuned on the target data",
}


def verdict(delivered: Delivered) -> str:
    """Say which adapter to take and why, in two or three sentences."""
    return f"Take this adapter: {delivered.title}. {delivered.why}"


def chosen(record: RunRecord) -> Delivered | None:
    """What a run handed over by its dev losses; None where it has not, or where the recipe asks for GRASP's result."""
    delivered = record.metrics.delivered if record.metrics else None
    return delivered if delivered and record.recipe.final.deliver == "best" else None


def delivered_system(record: RunRecord) -> str:
    """The system whose adapter lies in `adapter/`: in folders of older versions always GRASP's."""
    delivered = record.metrics.delivered if record.metrics else None
    return delivered.name if delivered else "grasp"


def predict_command(folder: Path | None = None) -> str:
    """One command that answers a prompt of the run; without a folder as it is given inside that of the run."""
    places = [str(Path(name) if folder is None else folder / name) for name in (ADAPTER_FOLDER, PROMPT_FILE)]
    adapter, prompt = map(shlex.quote, places)
    return f"grasp-lora predict {adapter} --jsonl < {prompt}"

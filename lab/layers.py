"""Which layers an adapter should have, and at which rate: dev losses first, answers after. The plan is in `lab/log.md`.

    python lab/layers.py rates tydiqa-sw FOLDER      # source adapters, then continued and sum on the best of each kind of layers
    python lab/layers.py answers tydiqa-sw FOLDER    # at the best rates: test losses and scores, seeds 42 and 1337

Both go on where they were stopped, and leave a row of `layers.jsonl` for each number. Needs GRASP_LORA_DATA.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from grasp_lora.engine.check import check
from grasp_lora.engine.results import Adapter
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import Store
from grasp_lora.recipes.load import load_recipe
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.storage.claims import working_in

LAYERS = {"q v": "[q_proj, v_proj]", "all": "all-linear"}
SOURCE_RATES = {"q v": (1e-4, 3e-4, 1e-3), "all": (5e-5, 1e-4, 2e-4)}
TARGET_RATES = {"q v": (1e-4, 3e-4), "all": (3e-5, 1e-4, 2e-4)}
SETTINGS = {
    "tydiqa-sw": ["data.source.train=1000", "data.target.test=300"],
    "nusax-su": [],
}
SEEDS = (42, 1337)


def recipe_of(setting: str, layers: str, source_rate: float, target_rate: float = 1e-4, seed: int = 42) -> Recipe:
    changes = [
        *SETTINGS[setting],
        f"lora.target_modules={LAYERS[layers]}",
        f"source.training.learning_rate={source_rate}",
    ]
    changes += [f"{stage}.training.learning_rate={target_rate}" for stage in ("target", "controller", "final")]
    return load_recipe(setting, [*changes, f"seed={seed}"])[0]


def main(part: str, setting: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with working_in(folder) as work:
        work.begin(shared=True)
        first = Session(recipe_of(setting, "q v", 3e-4), Path.cwd())
        check(first)
        store = Store(folder / "steps", first.progress, work)

        def steps(*how: object, seed: int = 42) -> Steps:
            session = first.variant(recipe_of(setting, *how))  # type: ignore[arg-type]
            shared = session
            if seed != 42:
                session = session.variant(session.recipe.model_copy(update={"seed": seed}))
            return Steps(session, store, shared, stop_requested=lambda: work.interruption.asked_by)

        rows = folder / f"layers-{part}.jsonl"
        rows.write_text("")

        def tell(**row: object) -> None:
            with rows.open("a") as file:
                file.write(json.dumps({"setting": setting, **row}) + "\n")
            print(row, flush=True)

        best: dict[str, tuple[float, dict[str, float]]] = {}
        for layers in LAYERS:
            losses = {}
            for rate in SOURCE_RATES[layers]:
                source = steps(layers, rate).source()
                losses[rate] = source.made.result.dev_loss
                tell(layers=layers, what="source", rate=rate, dev_loss=losses[rate], seconds=source.made.seconds)
            source_rate = min(losses, key=losses.__getitem__)
            targets: dict[str, dict[float, float]] = {"continued": {}, "merged": {}}
            for rate in TARGET_RATES[layers]:
                work_ = steps(layers, source_rate, rate)
                for name, adapter in (("continued", work_.continued()), ("merged", work_.parents().merged)):
                    losses_ = work_.losses(adapter, "dev").result.losses
                    targets[name][rate] = sum(losses_) / len(losses_)
                    tell(layers=layers, what=name, source_rate=source_rate, rate=rate, dev_loss=targets[name][rate])
            best[layers] = source_rate, {name: min(of, key=of.__getitem__) for name, of in targets.items()}
            tell(layers=layers, what="best", source_rate=source_rate, **best[layers][1])
        if part == "answers":
            for seed in SEEDS:
                for layers, (source_rate, rates) in best.items():
                    for name in ("source", "continued", "merged"):
                        work_ = steps(layers, source_rate, rates.get(name, 1e-4), seed=seed)
                        adapter = {
                            "source": work_.source,
                            "continued": work_.continued,
                            "merged": lambda: work_.parents().merged,
                        }[name]()
                        measured = work_.measure(adapter)
                        scores = {key: score.value for key, score in measured.scores.result.metrics.items()}
                        tell(
                            seed=seed,
                            layers=layers,
                            what=name,
                            test_loss=measured.test_loss,
                            dev_loss=measured.dev.result.mean,
                            **scores,
                        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

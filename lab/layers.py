"""Which layers an adapter should have, and at which rate: dev losses first, answers after. The plan is in `lab/log.md`.

    python lab/layers.py rates tydiqa-sw FOLDER      # source adapters, then continued and sum on the best of each kind of layers
    python lab/layers.py answers tydiqa-sw FOLDER    # at the best rates: test losses and scores, seeds 42 and 1337
    python lab/layers.py answers english-qa FOLDER   # Swahili on the source adapter that comes along
    python lab/layers.py rates demo-zh FOLDER        # the demo, on the same

Both go on where they were stopped, and leave a row of `layers-PART.jsonl` for each number. Needs GRASP_LORA_DATA.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

from grasp_lora.engine.check import check
from grasp_lora.engine.results import Adapter
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import Store
from grasp_lora.recipes.load import load_recipe
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.storage.claims import Workplace, working_in

LAYERS = {"q v": "[q_proj, v_proj]", "all": "all-linear"}
# Of source adapters, and of what is trained on them; the lowest dev loss of seed 42 is taken. Sources of questions
# have the rate that `init` writes; what is trained on them had 1e-4 until 3e-5 was asked.
QUESTIONS = {"q v": ((3e-4,), (1e-4,)), "all": ((1e-4,), (1e-4,))}
GIVEN = QUESTIONS | {"all": ((1e-4,), (3e-5, 5e-5, 1e-4))}  # the source comes along
RATES = {
    "tydiqa-sw": QUESTIONS,
    **dict.fromkeys(("english-qa", "demo-zh", "demo-ar"), GIVEN),
    "nusax-su": {"q v": ((1e-4, 3e-4), (1e-4, 3e-4)), "all": ((5e-5, 1e-4), (3e-5, 1e-4, 2e-4))},
}
SETTINGS = {
    "tydiqa-sw": ("tydiqa-sw", ["data.source.train=1000", "data.target.test=300"]),
    "english-qa": ("tydiqa-sw", ["data.source=null", "source.adapters=[english-qa]", "data.target.test=300"]),
    "demo-zh": ("demo-zh", []),
    "demo-ar": ("demo-ar", []),
    "nusax-su": ("nusax-su", []),
}
SEEDS = (42, 1337)


class Layers:
    """The steps of one setting; its rows and backbone are loaded once."""

    def __init__(self, setting: str, part: str, folder: Path, work: Workplace) -> None:
        self.setting, self.work = setting, work
        self.session = Session(self.recipe("q v", 3e-4), Path.cwd())
        check(self.session)
        self.store = Store(folder / "steps", self.session.progress, work)
        self.rows = folder / f"layers-{part}.jsonl"
        self.rows.write_text("")

    def recipe(self, layers: str, source_rate: float, target_rate: float = 1e-4) -> Recipe:
        rates = {"source": source_rate} | dict.fromkeys(("target", "controller", "final"), target_rate)
        changes = [f"{stage}.training.learning_rate={rate}" for stage, rate in rates.items()]
        name, settings = SETTINGS[self.setting]
        return load_recipe(name, [*settings, f"lora.target_modules={LAYERS[layers]}", *changes])[0]

    def steps(self, layers: str, source_rate: float, target_rate: float = 1e-4, seed: int = SEEDS[0]) -> Steps:
        shared = self.session.variant(self.recipe(layers, source_rate, target_rate))
        seeded = shared.variant(shared.recipe.model_copy(update={"seed": seed}))
        return Steps(seeded, self.store, shared, stop_requested=lambda: self.work.interruption.asked_by)

    def tell(self, **row: object) -> None:
        line = json.dumps({"setting": self.setting, **row})
        with self.rows.open("a") as file:
            file.write(line + "\n")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def rates(self, layers: str) -> dict[str, float]:
        """The rates of the lowest dev loss: of the source adapter, and on it of `continued` and of the sum."""
        losses = {}
        source_rates, target_rates = RATES[self.setting][layers]
        for rate in source_rates:
            made = self.steps(layers, rate).source().made
            if made is None:  # it comes along
                losses[rate] = 0.0
                break
            losses[rate] = made.result.dev_loss
            self.tell(layers=layers, what="source", rate=rate, dev_loss=losses[rate], seconds=made.seconds)
        best = {"source": min(losses, key=losses.__getitem__)}
        for name in ("continued", "merged"):
            losses = {}
            for rate in target_rates:
                steps = self.steps(layers, best["source"], rate)
                losses[rate] = fmean(steps.losses(adapter_of(steps, name), "dev").result.losses)
                self.tell(layers=layers, what=name, rate=rate, dev_loss=losses[rate])
            best[name] = min(losses, key=losses.__getitem__)
        self.tell(layers=layers, best=best)
        return best

    def answers(self, layers: str, best: dict[str, float], seed: int) -> None:
        """Test loss and scores of the three systems."""
        for name in ("source", "continued", "merged"):
            steps = self.steps(layers, best["source"], 1e-4 if name == "source" else best[name], seed)
            measured = steps.measure(adapter_of(steps, name))
            losses = {"dev_loss": measured.dev_loss, "test_loss": measured.test_loss}
            self.tell(layers=layers, what=name, seed=seed, **losses, **measured.values)


def adapter_of(steps: Steps, name: str) -> Adapter:
    if name == "source":
        return steps.source()
    return steps.continued() if name == "continued" else steps.parents().merged


def main(part: str, setting: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with working_in(folder) as work:
        work.begin(shared=True)
        layers = Layers(setting, part, folder, work)
        best = {name: layers.rates(name) for name in LAYERS}
        if part == "answers":
            for seed in SEEDS:
                for name, rates in best.items():
                    layers.answers(name, rates, seed)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

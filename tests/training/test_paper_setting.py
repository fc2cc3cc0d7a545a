"""The paper's setting as the released code has it: two adapters that stay apart while they train, and eight rounds of a run.

`python tests/training/test_paper_setting.py` writes `paper_rounds.json` anew: the order of the examples and the candidates are
those of a run of the package, all that follows from them is computed by `paper_reference`.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import build_tiny_model
from paper_reference import Reference, digest
from random_examples import make_examples

from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.method.masks import MaskSet
from grasp_lora.method.merging import MergeSettings, merge
from grasp_lora.method.search import Controller, PaperPolicy, Rounds
from grasp_lora.models.adapters import attached
from grasp_lora.models.live import segments_of
from grasp_lora.training.controller import GraspController
from grasp_lora.training.probes import ProbeSet
from grasp_lora.training.trainer import finetune
from grasp_lora.training.training_settings import TrainingSettings

FILE = Path(__file__).with_name("paper_rounds.json")
PAD, EVERY, LEARNING_RATE = 0, 2, 3e-2
TRAIN, MICRO_DEV, DEV = make_examples(8), make_examples(4, 1, "m"), make_examples(4, 2, "d")
MODULES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qv"]
RANK = 4


def adapters(model: torch.nn.Module) -> list[AdapterWeights]:
    """A source and a target adapter, every weight away from zero."""
    found = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        pairs = {}
        for name in MODULES:
            d_out, d_in = model.get_submodule(name).weight.shape
            A, B = (torch.randn(shape, generator=generator) for shape in ((RANK, d_in), (d_out, RANK)))
            pairs[name] = LoraPair(0.1 * A, 0.1 * B, scaling=4.0)
        found.append(AdapterWeights(pairs))
    return found


def flat_masks(masks: MaskSet) -> torch.Tensor:
    """As `Reference.flat_masks` lays them out."""
    found = []
    for (_, factor), keep in sorted(masks.keep.items()):
        found += [~one.flatten() for one in keep.chunk(2, dim=0 if factor == "A" else 1)]
    return torch.cat(found)


def our_run(folder: Path) -> tuple[list[int], list[dict[str, Any]]]:
    """The order of the examples and the rounds of the package's own run, at float64."""
    model = build_tiny_model("llama").double()
    merged = merge(adapters(model), MergeSettings("paper_apart"))
    order, rounds, places = [], [], {one.prompt_ids: place for place, one in enumerate(TRAIN)}

    def see(module: torch.nn.Module, given: Any, named: dict[str, Any]) -> None:
        if module.training:
            ids, length = named["input_ids"][0].tolist(), int(named["logits_to_keep"][0].nonzero()[0]) + 1
            order.append(places[tuple(ids[:length])])

    def keep(row: dict[str, Any]) -> None:
        masked = flat_masks(controller.masks)
        losses = row["baseline_losses"]
        kept = {
            name: row[name] for name in ("candidates", "rewards", "policy_mean", "policy_std", "committed", "ratio")
        }
        more = {"baseline_loss": sum(losses) / len(losses), "masked": int(masked.sum()), "masks": digest(masked)}
        rounds.append(kept | more)

    controller = GraspController(
        ProbeSet(MICRO_DEV),
        Controller(PaperPolicy(seed=3), Rounds(EVERY), "best_reward"),
        segments=segments_of(merged),
        on_round=keep,
    )
    settings = TrainingSettings(2, learning_rate=LEARNING_RATE, max_grad_norm=0.0, patience=3)
    with attached(model, merged) as peft_model:
        peft_model.double().register_forward_pre_hook(see, with_kwargs=True)
        finetune(peft_model, TRAIN, DEV, settings, pad_id=PAD, seed=1, folder=folder, controller=controller)
    return order, rounds


def reference_run(order: list[int], candidates: list[list[float]]) -> list[dict[str, Any]]:
    model = build_tiny_model("llama").double()
    parents = adapters(model)
    factors = {
        f"{name}.{factor}": [getattr(one[name], factor).double().requires_grad_() for one in parents]
        for name in MODULES
        for factor in "AB"
    }
    return Reference(model, factors).run(TRAIN, MICRO_DEV, order, candidates, EVERY, LEARNING_RATE)


def as_recorded(rounds: list[dict[str, Any]], tolerance: float) -> list[dict[str, Any]]:
    """Numbers to a tolerance, flags, counts and hashes exactly."""
    return [
        {
            name: pytest.approx(value, abs=tolerance) if name not in ("committed", "masked", "masks") else value
            for name, value in row.items()
        }
        for row in rounds
    ]


def test_eight_rounds_are_those_of_an_independent_reference(tmp_path):
    recorded = json.loads(FILE.read_text(encoding="utf-8"))
    rounds = recorded["rounds"]
    assert reference_run(recorded["order"], [row["candidates"] for row in rounds]) == as_recorded(rounds, 1e-10)
    order, found = our_run(tmp_path)
    assert order == recorded["order"]
    assert found == as_recorded(rounds, 1e-9)
    # It shows what a run can do: commits up and down, a round without one, masks that change and one that stays.
    assert len(rounds) == 8
    assert {row["committed"] for row in rounds} == {True, False}
    moves = [later["ratio"] - earlier["ratio"] for earlier, later in itertools.pairwise(rounds)]
    assert min(moves) < 0 < max(moves)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        taken, ours = our_run(Path(scratch))
    rows = reference_run(taken, [row["candidates"] for row in ours])
    FILE.write_text(json.dumps({"order": taken, "rounds": rows}, indent=1) + "\n", encoding="utf-8")

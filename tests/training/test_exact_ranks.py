"""One, two and three gloo processes take the same optimizer steps: in float64 without dropout they end in the same numbers."""

import os
from pathlib import Path

import forked
import pytest
import torch

from grasp_lora.models.live import live_factors

COUNTS = (12, 10, 14)  # of training examples: three processes share the first evenly, none of them the others
ACCUMULATION = 6

WORKER = """
import os, sys
from pathlib import Path

sys.path[:0] = [os.environ["TESTS_FOLDER"], str(Path(os.environ["TESTS_FOLDER"], "training"))]
import torch
import test_exact_ranks

test_exact_ranks.work(Path(sys.argv[1]))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def examples(count: int, seed: int, name: str) -> list:
    import random
    from types import SimpleNamespace

    generator = random.Random(seed)

    def tokens(fewest: int, most: int) -> tuple[int, ...]:
        return tuple(generator.randrange(4, 260) for _ in range(generator.randint(fewest, most)))

    return [
        SimpleNamespace(id=f"{name}{index}", prompt_ids=tokens(2, 12), completion_ids=(*tokens(0, 4), 2))
        for index in range(count)
    ]


def work(folder: Path) -> None:
    """Learn a ratio and make a final run, for each number of examples; save what came out."""
    from dataclasses import replace

    from conftest import build_tiny_model

    from grasp_lora.method.policy import Gaussian
    from grasp_lora.method.presets import Controller
    from grasp_lora.method.schedule import Rounds
    from grasp_lora.models.adapters import fresh_adapter
    from grasp_lora.models.settings import LoraSettings
    from grasp_lora.training.controller import GraspController
    from grasp_lora.training.finetune import finetune
    from grasp_lora.training.probes import ProbeSet
    from grasp_lora.training.pruned import PrunedTraining
    from grasp_lora.training.settings import TrainingSettings

    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    backbone = build_tiny_model("gpt2").double()  # Llama's norms compute in float32 whatever comes
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    lora = LoraSettings(rank=4, dropout=0.0, target_modules=("c_attn",))
    settings = TrainingSettings(epochs=2, batch_size=1, accumulation=ACCUMULATION, learning_rate=1e-3, patience=None)
    settings = settings.shared_by(processes)
    probes, results = ProbeSet(examples(5, 1, "m"), 0, 20), {}
    for count in COUNTS:
        train, dev = examples(count, 0, "e"), examples(4, 2, "d")
        for name, controller in {
            "spread": Controller(rounds=replace(Controller().rounds, patience=None)),
            "gaussian": Controller(Gaussian(), Rounds(2), "smooth_fit"),
        }.items():
            with fresh_adapter(backbone, lora, 1) as model:
                factors = live_factors(model.double())
                generator = torch.Generator().manual_seed(1)
                with torch.no_grad():
                    for factor in factors.values():
                        factor.copy_(0.3 * torch.randn(factor.shape, generator=generator, dtype=torch.float64))
                learning = GraspController(probes, controller)
                found = finetune(
                    model, train, [], settings, pad_id=0, seed=1, folder=folder / f"{name}{processes}",
                    controller=learning,
                )  # fmt: skip
                ratio = learning.learned.ratio
                pruning = PrunedTraining(ratio, probes)
                best = finetune(
                    model, train, dev, settings, pad_id=0, seed=1, folder=folder / f"final{processes}",
                    callbacks=[pruning],
                )  # fmt: skip
                results[count, name] = {
                    "ratio": ratio,
                    "steps": found.steps,
                    "rounds": [row["baseline_losses"] for row in learning.rows()[0]],
                    "dev_losses": [row["dev_loss"] for row in best.history if "dev_loss" in row],
                    "weights": {name: factor.detach().clone() for name, factor in live_factors(model).items()},
                }
    torch.save(results, folder / f"{processes}-{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """Number of processes -> what each of them found."""
    folder = tmp_path_factory.mktemp("exact")
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    environment = {**os.environ, "TESTS_FOLDER": str(Path(__file__).parent.parent)}
    for count in (1, 2, 3):
        done = forked.python(["worker.py", str(folder)], cwd=folder, env=environment, count=count)
        assert done.returncode == 0, done.stderr[-5000:]
    return {
        count: [torch.load(folder / f"{count}-{rank}.pt", weights_only=True) for rank in range(count)]
        for count in (1, 2, 3)
    }


@pytest.mark.parametrize("name", ["spread", "gaussian"])
@pytest.mark.parametrize("count", COUNTS)
def test_any_number_of_processes_gives_the_same_ratio_and_deltas(
    found: dict[int, list[dict]], count: int, name: str
) -> None:
    alone = found[1][0][count, name]
    assert alone["steps"] == 2 * -(-count // ACCUMULATION)
    assert len(alone["rounds"]) > 1
    for processes in (2, 3):
        for rank in found[processes]:
            shared = rank[count, name]
            assert shared["steps"] == alone["steps"]
            assert abs(shared["ratio"] - alone["ratio"]) <= 1e-8
            torch.testing.assert_close(shared["rounds"], alone["rounds"], rtol=0, atol=1e-8)
            torch.testing.assert_close(shared["dev_losses"], alone["dev_losses"], rtol=0, atol=1e-8)
            torch.testing.assert_close(shared["weights"], alone["weights"], rtol=0, atol=1e-8)

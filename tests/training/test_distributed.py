"""Two gloo processes on the CPU: they draw the same candidates, see the same losses and end with the same adapter."""

import os
from pathlib import Path

import forked
import pytest
import torch
from random_examples import assert_step, make_examples, put, random_adapter, read_rows

from grasp_lora.models.adapters import attached
from grasp_lora.training.probes import NormCollector, ProbeSet

RANKS = 2
PAD = 0

MICRO_DEV = make_examples(5, 1, "m")
MICRO_DEV_BUDGET = 20  # three batches

WORKER = """
import os, sys
from pathlib import Path

sys.path[:0] = [os.environ["TESTS_FOLDER"], os.environ["TESTS_FOLDER"] + "/training"]
import torch
from conftest import build_tiny_model
from random_examples import Watch, factors, make_examples, random_adapter, values
from test_distributed import MICRO_DEV, MICRO_DEV_BUDGET
from transformers import TrainerCallback, TrainingArguments

from grasp_lora.method.masks import MaskSet, MaskSettings
from grasp_lora.training import trainer as finetune_module
from grasp_lora.models.adapters import attached
from grasp_lora.method.search import Controller, PaperPolicy, Rounds
from grasp_lora.training.controller import GraspController
from grasp_lora.training.trainer import FineTuneTrainer, finetune
from grasp_lora.training.probes import NormCollector, ProbeSet, calibrate
from grasp_lora.training.pruned import PrunedTraining
from grasp_lora.training.training_settings import TrainingSettings

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
fed = []
collate = finetune_module.collate
finetune_module.collate = lambda batch, pad_id: fed.append([example.id for example in batch]) or collate(batch, pad_id)
results = {}


# A step over several processes. Seven examples do not divide evenly.
backbone = build_tiny_model("llama")
settings = TrainingSettings(epochs=2, accumulation=2, learning_rate=1e-2, lr_decay=0.5, max_grad_norm=0.0)
with attached(backbone, random_adapter(backbone)) as model:
    watch = Watch()
    found = finetune(
        model, make_examples(7), [], settings, pad_id=0, seed=1, folder=folder / "plain", callbacks=[watch]
    )
    results["plain"] = {"fed": fed[:4], "steps": found.steps, "watch": vars(watch), "history": found.history}

# Processes with different numbers of examples in a step: two and one.
finetune_module.collate = collate
with attached(backbone, random_adapter(backbone)) as model:
    watch = Watch()
    trainer = FineTuneTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "uneven"), num_train_epochs=1, per_device_train_batch_size=2, max_grad_norm=0.0,
            learning_rate=1e-2, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
            remove_unused_columns=False, logging_steps=1, accelerator_config={"even_batches": False},
        ),
        train_dataset=make_examples(3),
        data_collator=lambda examples: collate(examples, 0),
        callbacks=[watch],
    )
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    results["uneven"] = {"watch": vars(watch), "loss": logged[0], "sizes": int(trainer._examples_per_rank * 2)}


# The controller, with dev set and a score that gathers norms on all processes.
class First(TrainerCallback):  # before the controller, at its first round
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            results["at_first_round"] = [factor.detach().clone() for factor in factors(kwargs["model"])]


for score in ("input_aware", "magnitude"):
    with attached(backbone, random_adapter(backbone), dropout=0.3) as model:
        micro_dev = ProbeSet(MICRO_DEV)
        controller = GraspController(
            micro_dev, Controller(PaperPolicy(), Rounds(2), "surrogate_at_end"), MaskSettings(score), folder=folder / score
        )
        callbacks = [First()] if score == "input_aware" else []
        found = finetune(
            model, make_examples(12), make_examples(4, 2, "d"),
            TrainingSettings(epochs=2, learning_rate=1e-2, patience=99), pad_id=0, seed=1,
            folder=folder / score, callbacks=callbacks, controller=controller,
        )
        results[score] = {
            "records": controller.rows()[0],
            "keep": controller.masks.keep,
            "weights": values(model),
            "ratio": controller.search.current_ratio,
            "best": controller.learned.ratio,
            "result": vars(found),
        }

# The final run.
for mode in ("hold", "reselect"):
    with attached(backbone, random_adapter(backbone), dropout=0.3) as model:
        pruned = PrunedTraining(0.5, ProbeSet(MICRO_DEV), MaskSettings("gradient_of_delta"), mode)
        finetune(
            # Without a dev set the last step's weights stay, and with them the mask that the ranks are asked for.
            model, make_examples(6), [], TrainingSettings(epochs=1, learning_rate=1e-2), pad_id=0, seed=1,
            folder=folder / mode, callbacks=[pruned],
        )
        results[mode] = {
            "weights": values(model),
            "keep": pruned.masks.keep,
            "norms": {name: (norm.A, norm.B) for name, norm in pruned.masks.norms.items()},
            "sparsity": pruned.masks.sparsity(),
        }

with attached(backbone, random_adapter(backbone)) as model:
    collector = NormCollector(model)
    with collector.collecting():
        ProbeSet(MICRO_DEV).losses(model, collector)
    results["norms"] = [{name: (norm.A, norm.B) for name, norm in collector.norms().items()} for _ in range(2)]

# All processes refuse a loss that is not finite, also the one that did not measure it.
with torch.no_grad():
    backbone.get_input_embeddings().weight[MICRO_DEV[0].prompt_ids[0]] = float("nan")
try:
    ProbeSet(MICRO_DEV).losses(backbone)
except ValueError as error:
    results["error"] = str(error)
torch.save(results, folder / f"rank{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have run the worker; a hang ends."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    environment = os.environ | {"TESTS_FOLDER": str(Path(__file__).parent.parent)}
    done = forked.python(["worker.py", str(folder)], cwd=folder, env=environment, count=RANKS)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    """What each process found."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


def same(one, other) -> bool:
    """Whether nested lists, dicts and tensors are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.fixture
def model(make_tiny_model):
    backbone = make_tiny_model("llama")
    with attached(backbone, random_adapter(backbone)) as model:
        yield model


def test_a_step_follows_the_mean_over_the_examples_of_all_ranks(ranks, model):
    plain = [rank["plain"] for rank in ranks]
    examples = {example.id: example for example in make_examples(7)}
    fed = [[name for batch in rank["fed"] for name in batch] for rank in plain]
    assert len([*fed[0], *fed[1]]) == 8  # accelerate takes one twice, so that both processes have as many
    assert {*fed[0], *fed[1]} == {*examples}
    assert same(plain[0]["watch"], plain[1]["watch"])
    for step in range(2):  # of the first epoch: two batches of one example on each process
        both = [examples[name] for names in fed for name in names[2 * step : 2 * step + 2]]
        assert_step(model, plain[0]["watch"], step, both, plain[0]["history"][step]["loss"])
    # Seven examples, two processes, two batches of one in a step: two steps an epoch.
    assert plain[0]["steps"] == plain[1]["steps"] == 4
    assert plain[0]["watch"]["rates"] == pytest.approx([1e-2, 1e-2, 5e-3, 5e-3])


def test_ranks_with_unequal_numbers_of_examples_weigh_each_alike(ranks, model):
    uneven = [rank["uneven"] for rank in ranks]
    assert same(uneven[0]["watch"], uneven[1]["watch"])
    assert uneven[0]["sizes"] == 3
    assert_step(model, uneven[0]["watch"], 0, make_examples(3), uneven[0]["loss"])


@pytest.mark.parametrize("score", ["input_aware", "magnitude"])
def test_ranks_agree_on_every_round(ranks, score):
    one, other = (rank[score] for rank in ranks)
    assert len(one["records"]) == 12 * 2 // RANKS // 2
    assert same(one["records"], other["records"])  # candidates, losses, rewards, policy, commits, sparsity
    assert same(one["keep"], other["keep"])
    assert same(one["weights"], other["weights"])
    assert (one["ratio"], one["best"]) == (other["ratio"], other["best"])
    assert one["result"]["dev_loss"] == other["result"]["dev_loss"]
    assert one["result"]["best_step"] == other["result"]["best_step"]
    assert any(record["committed"] for record in one["records"])


@pytest.mark.parametrize("mode", ["hold", "reselect"])
def test_ranks_agree_on_the_final_run(ranks, mode):
    one, other = (rank[mode] for rank in ranks)
    assert same(one, other)
    assert one["sparsity"] == 0.5


def test_losses_are_those_that_one_process_measures(ranks, model):
    put(model, ranks[0]["at_first_round"])
    alone = ProbeSet(MICRO_DEV).losses(model)
    for rank in ranks:
        assert rank["input_aware"]["records"][0]["baseline_losses"] == pytest.approx(alone, abs=1e-6)


def test_norms_count_each_example_once(ranks, model):
    collector = NormCollector(model)
    with collector.collecting():
        ProbeSet(MICRO_DEV).losses(model, collector)
    norms = collector.norms()
    for found in (*ranks[0]["norms"], *ranks[1]["norms"], ranks[0]["hold"]["norms"]):  # asked twice, the same
        for name, (norm_A, norm_B) in found.items():
            torch.testing.assert_close(norm_A, norms[name].A, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(norm_B, norms[name].B, rtol=1e-5, atol=1e-6)


def test_records_are_written_once(ranks, folder):
    for score in ("input_aware", "magnitude"):
        rows = read_rows(folder / score / "rounds.jsonl")
        assert [row["round"] for row in rows] == list(range(1, 7))
        assert rows == ranks[0][score]["records"]
        history = read_rows(folder / score / "history.jsonl")
        assert history == ranks[0][score]["result"]["history"]
        # The dev loss is measured once an epoch, whose steps are shared by the processes.
        assert [row["step"] for row in history if "dev_loss" in row] == [0, 6, 12]


def test_every_rank_refuses_a_loss_that_is_not_finite(ranks):
    for rank in ranks:
        assert rank["error"].startswith(f"the loss of example {MICRO_DEV[0].id} is nan")

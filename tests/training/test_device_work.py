"""What a step's masks ask of the device: nothing that makes the host wait, and at one ratio as much for many modules as few."""

from collections import Counter, defaultdict

import pytest
import torch
from random_examples import make_examples, random_merged
from torch.utils._python_dispatch import TorchDispatchMode

from grasp_lora.method.search import POLICIES, Controller, Rounds
from grasp_lora.models.adapters import attached
from grasp_lora.models.live import segments_of
from grasp_lora.training.controller import GraspController
from grasp_lora.training.probes import ProbeSet
from grasp_lora.training.pruned import PrunedTraining
from grasp_lora.training.trainer import finetune
from grasp_lora.training.training_settings import TrainingSettings

EXAMPLES = make_examples(8, seed=3)
STEPS = 8
# To read a value, to copy from the host or another device, or to ask for a shape that only the values tell.
WAITING = ("_local_scalar_dense", "_to_copy", "lift_fresh", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
HOOKS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_epoch_end")


class Operations(TorchDispatchMode):
    """Counts every tensor operation, those that only make a view included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count_operations(pruned: PrunedTraining) -> dict[int, Counter[str]]:
    """Have the operations of a callback's hooks counted, by step."""
    steps: dict[int, Counter[str]] = defaultdict(Counter)

    def counted(name: str, hook):
        def call(args, state, control, **kwargs):
            with Operations() as operations:
                hook(args, state, control, **kwargs)
            steps[state.global_step + (name in HOOKS[:3])] += operations.counts  # not counted before the step ends

        return call

    for name in HOOKS:
        setattr(pruned, name, counted(name, getattr(pruned, name)))
    return steps


def counted_steps(make_tiny_model, tmp_path, layers: int, kind: str) -> list[Counter[str]]:
    """The operations of each step between the first, whose gradients are checked, and the next round."""
    backbone = make_tiny_model("llama", layers=layers)
    weights = random_merged(backbone, (1, 3), 1.0)
    probes, segments = ProbeSet(EXAMPLES[:2]), segments_of(weights)
    pruned: PrunedTraining
    if kind == "final":
        pruned = PrunedTraining(0.4, probes, segments=segments)
    else:
        settings = Controller(POLICIES[kind](), Rounds(STEPS), "surrogate_at_end")
        pruned = GraspController(probes, settings, segments=segments)
    steps = count_operations(pruned)
    with attached(backbone, weights) as model:
        training = TrainingSettings(epochs=1, patience=None)
        finetune(model, EXAMPLES, (), training, pad_id=0, seed=1, folder=tmp_path, callbacks=[pruned])
        assert pruned.masks.sparsity() > 0.0
    return [steps[step] for step in range(2, STEPS)]


@pytest.mark.parametrize("kind", ["final", "paper", "grpo"])
def test_the_work_of_a_step_neither_grows_with_the_modules_nor_waits(make_tiny_model, tmp_path, kind):
    few, many = (counted_steps(make_tiny_model, tmp_path / str(layers), layers, kind) for layers in (2, 6))
    if kind == "grpo":  # a mask for each step: some operations a factor
        assert all(0 < sum(step.values()) <= 15 * 2 * 2 * 6 for step in many)
    else:  # the weights, after the step: gradients were masked before they were clipped, which is no hook
        assert few == many == [Counter(_foreach_mul_=1)] * len(few)
    for step in few:  # nothing is read from the device or copied to it between rounds
        assert not [name for name in step if name in WAITING], step


def test_the_counter_sees_what_waits():
    with Operations() as operations:
        float(torch.ones(2).sum())
        torch.tensor([1, 2]).to(torch.float64)
        torch.ones(2).nonzero()
    assert {"_local_scalar_dense", "lift_fresh", "_to_copy", "nonzero"} <= operations.counts.keys()

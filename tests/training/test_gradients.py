"""A training in which no LoRA weight has a gradient ends in one line at its first step, and no other does."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from random_examples import make_examples

from grasp_lora.errors import GraspError
from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.models.adapters import attached, fresh_adapter
from grasp_lora.models.live import live_pairs
from grasp_lora.models.model_settings import LoraSettings
from grasp_lora.training.trainer import finetune
from grasp_lora.training.training_settings import TrainingSettings

EXAMPLES = make_examples(4)


@pytest.fixture
def model(make_tiny_model: Callable) -> Iterator[PeftModel]:
    with fresh_adapter(make_tiny_model("llama"), LoraSettings(rank=2), 1) as peft_model:
        yield peft_model


@pytest.fixture
def train(tmp_path: Path) -> Callable[[PeftModel], int]:
    settings = TrainingSettings(epochs=1, patience=None)
    return lambda model: finetune(model, EXAMPLES, [], settings, pad_id=0, seed=1, folder=tmp_path).steps


def cut(module: torch.nn.Module) -> None:
    """Let gradients end here, as quantised layers do whose kernel has no backward."""
    module.register_forward_hook(lambda *arguments: arguments[-1].detach() + 0.0 * arguments[-1])


def test_a_fresh_adapter_passes(model: PeftModel, train: Callable) -> None:
    assert train(model) == 4  # only its B have gradients, since they are zero


def test_a_backbone_that_cuts_gradients_is_named_before_the_first_step(model: PeftModel, train: Callable) -> None:
    before = [pair.A.detach().clone() for pair in live_pairs(model).values()]
    cut(model.get_base_model().model.norm)
    with pytest.raises(GraspError, match=r"gradient checkpointing.*enable_input_require_grads.*quantised") as error:
        train(model)
    assert "\n" not in str(error.value)
    assert all(torch.equal(pair.A, kept) for pair, kept in zip(live_pairs(model).values(), before, strict=True))


def test_one_module_with_a_gradient_is_enough(model: PeftModel, train: Callable) -> None:
    cut(model.get_base_model().model.layers[0])
    assert train(model) == 4


def test_an_adapter_that_is_pruned_to_nothing_has_none_to_have(make_tiny_model: Callable, train: Callable) -> None:
    weights = {f"model.layers.{n}.self_attn.q_proj": LoraPair(torch.zeros(2, 32), torch.zeros(32, 2)) for n in (0, 1)}
    with attached(make_tiny_model("llama"), AdapterWeights(weights)) as model:
        assert train(model) == 4

"""PEFT's add_weighted_adapter as the second opinion on the merge rules."""

from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.method.merging import MergeRule, MergeSettings, drop_and_rescale, merge

D_IN, D_OUT = 12, 10
DARE = MergeRule("DARE on the factors, summed", sparsify=drop_and_rescale, draws=True)


class TwoLayers(torch.nn.Module):
    """Layers whose names sort as they stand, so that both implementations draw in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(D_IN, D_OUT, bias=False)
        self.second = torch.nn.Linear(D_IN, D_OUT, bias=False)


@pytest.fixture
def peft_deltas() -> Callable[..., tuple[list[AdapterWeights], dict[str, Tensor]]]:
    """Build adapters in PEFT, merge them there; give the adapters and the merged deltas."""

    def build(
        weights: Sequence[float], combination: str, ranks: Sequence[int] = (3, 3), **options: Any
    ) -> tuple[list[AdapterWeights], dict[str, Tensor]]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            more: dict[str, Any] = {"target_modules": ["first", "second"], "init_lora_weights": False}
            configs = {
                f"adapter_{index}": peft.LoraConfig(r=rank, lora_alpha=(2, 9, 4)[index], **more)
                for index, rank in enumerate(ranks)
            }
            names = list(configs)
            model = peft.PeftModel(TwoLayers(), configs[names[0]], names[0])
            for name in names[1:]:
                model.add_adapter(name, configs[name])
        layers = {name: getattr(model.base_model.model, name) for name in ("first", "second")}
        adapters = []
        for name in names:
            parts = {key: (one.lora_A[name], one.lora_B[name], one.scaling[name]) for key, one in layers.items()}
            pairs = {key: LoraPair(A.weight.detach(), B.weight.detach(), size) for key, (A, B, size) in parts.items()}
            adapters.append(AdapterWeights(pairs))
        model.add_weighted_adapter(names, list(weights), "merged", combination_type=combination, **options)
        return adapters, {module: layer.get_delta_weight("merged").detach() for module, layer in layers.items()}

    return build


def assert_agree(merged: AdapterWeights, deltas: dict[str, Tensor]) -> None:
    assert set(merged) == set(deltas)
    for module, delta in deltas.items():
        assert delta.norm() > 0
        torch.testing.assert_close(
            merged[module].delta().double(), delta.double(), rtol=0, atol=1e-5 * float(delta.norm())
        )


EACH = [("exact", "cat"), ("svd", "svd"), ("paper_sum", "linear"), ("ties", "ties")]
WEIGHTS = [(1.0, 1.0), (0.3, 0.7), (1.2, -0.5)]


@pytest.mark.parametrize(
    ("rule", "combination", "weights", "ranks"),
    [
        *((*row, weights, (3, 3)) for row in EACH for weights in WEIGHTS),
        *((*row, (0.5, 0.2, -1.0), (2, 5, 3)) for row in EACH[:2]),
    ],
)
def test_rules_agree_with_peft(rule, combination, weights, ranks, peft_deltas):
    options = {"density": 0.4} if "ties" in combination else {}
    adapters, deltas = peft_deltas(weights, combination, ranks, **options)
    assert_agree(merge(adapters, MergeSettings(rule, weights=weights, **options)), deltas)


@pytest.mark.parametrize(
    ("rule", "combination"), [(DARE, "dare_linear"), ("dare_ties", "dare_ties")], ids=["dare", "dare_ties"]
)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_dare_agrees_with_peft_under_the_same_drops(rule, combination, weights, peft_deltas, monkeypatch):
    draws = torch.Generator().manual_seed(42)

    def same_drops(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        assert rescale
        return tensor * (torch.rand(tensor.shape, generator=draws) < density) / density

    monkeypatch.setattr("peft.utils.merge_utils.random_pruning", same_drops)
    adapters, deltas = peft_deltas(weights, combination, density=0.6)
    assert_agree(merge(adapters, MergeSettings(rule, weights=weights, density=0.6)), deltas)

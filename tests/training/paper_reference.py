"""The controller run of the paper, once more and on its own: plain tensors, sorted lists and the formulas of the paper.

Two adapters A_1, B_1 and A_2, B_2 a module act as (B_1 + B_2)(A_1 + A_2) and are masked each on its own. Nothing here is the
package's: no mask, no policy, no trainer, no PEFT. What is random is given: the order of the examples and the candidates.

`python tests/training/test_paper_setting.py` writes `paper_rounds.json` from it.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

RATIO_MIN, RATIO_MAX, RATIO_INIT = 0.10, 0.80, 0.40
POLICY_LEARNING_RATE, KL, ENTROPY_BONUS, MAX_STEP = 0.05, 0.05, 0.01, 0.10
LR_DECAY = 0.85

Factors = dict[str, list[Tensor]]  # module.A or module.B -> that factor of each adapter


@dataclass
class Reference:
    """A model with two adapters, trained by AdamW one example at a time.

    Args:
        model: its modules named in `factors` are changed by hooks.
        factors: start values; leaves that require gradients, held here.
    """

    model: torch.nn.Module
    factors: Factors
    pruned: dict[str, list[Tensor]] = field(default_factory=dict)  # True where a weight is masked
    stash: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, module in self.model.named_modules():
            if f"{name}.A" in self.factors:
                module.register_forward_hook(self._adapted(name))
        for name, ones in self.factors.items():
            self.pruned[name] = [torch.zeros_like(one, dtype=torch.bool) for one in ones]
            self.stash[name] = [torch.zeros_like(one) for one in ones]

    def _adapted(self, name: str) -> Any:
        def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            (first_A, second_A), (first_B, second_B) = self.factors[f"{name}.A"], self.factors[f"{name}.B"]
            return output + inputs[0] @ ((first_B + second_B) @ (first_A + second_A)).T

        return add

    def loss(self, example: Any) -> Tensor:
        """Mean negative log-likelihood of the answer's tokens."""
        prompt, answer = list(example.prompt_ids), list(example.completion_ids)
        logits = self.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return -logits.log_softmax(-1)[range(len(answer)), answer].mean()

    @torch.no_grad()
    def mean_loss(self, examples: Sequence[Any]) -> float:
        """Of several examples."""
        return sum(float(self.loss(one)) for one in examples) / len(examples)

    def dense(self) -> Factors:
        """Every weight, masked ones with the values that they had."""
        lists = {
            name: zip(self.pruned[name], self.stash[name], ones, strict=True) for name, ones in self.factors.items()
        }
        return {name: [torch.where(off, kept, one.detach()) for off, kept, one in rows] for name, rows in lists.items()}

    def now(self) -> Factors:
        """Every weight as it is."""
        return {name: [one.detach().clone() for one in ones] for name, ones in self.factors.items()}

    def masks(self, ratio: float) -> dict[str, list[Tensor]]:
        """The floor(ratio * n) smallest weights of each adapter's A and of its B."""
        return {name: [smallest(one, ratio) for one in ones] for name, ones in self.dense().items()}

    @torch.no_grad()
    def put_on(self, masks: dict[str, list[Tensor]], weights: Factors) -> None:
        """Set the weights, zero where masked."""
        for name, ones in self.factors.items():
            for one, off, value in zip(ones, masks[name], weights[name], strict=True):
                one.copy_(torch.where(off, 0.0, value))

    def commit(self, ratio: float, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Mask for good; what is newly masked is stashed, and its moments are forgotten."""
        masks, dense = self.masks(ratio), self.dense()
        self.put_on(masks, dense)
        for name, ones in self.factors.items():
            for place, off in enumerate(masks[name]):
                self.stash[name][place] = torch.where(off, dense[name][place], 0.0)
                state = optimizer.state[ones[place]] if optimizer else {}
                for moment in ("exp_avg", "exp_avg_sq"):
                    if moment in state:
                        state[moment][off & ~self.pruned[name][place]] = 0.0
        self.pruned = masks

    def flat_masks(self) -> Tensor:
        """All masks in one row: modules by name, A before B, the first adapter before the second."""
        return torch.cat([off.flatten() for name in sorted(self.pruned) for off in self.pruned[name]])

    def run(
        self,
        train: Sequence[Any],
        micro_dev: Sequence[Any],
        order: Sequence[int],
        candidates: Sequence[Sequence[float]],
        every: int,
        learning_rate: float,
    ) -> list[dict[str, Any]]:
        """Train on `train[order[0]]` and so on; after every so many steps a round probes the next candidates."""
        optimizer = torch.optim.AdamW(
            [one for ones in self.factors.values() for one in ones], learning_rate, weight_decay=0.0
        )
        mean = ratio = RATIO_INIT
        std = (RATIO_MAX - RATIO_MIN) / 6
        rounds: list[dict[str, Any]] = []
        self.commit(ratio)
        for step, place in enumerate(order):
            optimizer.param_groups[0]["lr"] = learning_rate * LR_DECAY ** (step // len(train))
            optimizer.zero_grad()
            self.loss(train[place]).backward()
            for name, ones in self.factors.items():
                for one, off in zip(ones, self.pruned[name], strict=True):
                    one.grad[off] = 0.0  # type: ignore[index]
            optimizer.step()
            self.put_on(self.pruned, self.now())
            if (step + 1) % every:
                continue
            probed = candidates[len(rounds)]
            baseline, dense, now = self.mean_loss(micro_dev), self.dense(), self.now()
            rewards = []
            for candidate in probed:
                self.put_on(self.masks(candidate), dense)
                rewards.append(baseline - self.mean_loss(micro_dev))
                self.put_on(self.pruned, now)
            mean, std = learned(mean, std, ratio, probed, rewards)
            best = rewards.index(max(rewards))
            if rewards[best] >= 0.0:
                ratio += max(-MAX_STEP, min(MAX_STEP, probed[best] - ratio))
                self.commit(ratio, optimizer)
            measured = {"candidates": list(probed), "baseline_loss": baseline, "rewards": rewards}
            led_to = {"policy_mean": mean, "policy_std": std, "committed": rewards[best] >= 0.0, "ratio": ratio}
            flat = self.flat_masks()
            rounds.append(measured | led_to | {"masked": int(flat.sum()), "masks": digest(flat)})
        return rounds


def smallest(weights: Tensor, ratio: float) -> Tensor:
    """True for the floor(ratio * n) weights of least magnitude."""
    sizes = weights.abs().flatten().tolist()
    off = torch.zeros(len(sizes), dtype=torch.bool)
    off[sorted(range(len(sizes)), key=lambda place: (sizes[place], place))[: math.floor(ratio * len(sizes))]] = True
    return off.view(weights.shape)


def learned(
    mean: float, std: float, ratio: float, candidates: Sequence[float], rewards: Sequence[float]
) -> tuple[float, float]:
    """The paper's update of mean and deviation."""
    average, variance, count = sum(rewards) / len(rewards), max(std**2, 1e-4), len(rewards)
    pairs = [(reward - average, candidate - mean) for reward, candidate in zip(rewards, candidates, strict=True)]
    mean_gradient = sum(advantage * away / variance for advantage, away in pairs) / count
    std_gradient = sum(advantage * (away**2 / variance - 1.0) for advantage, away in pairs) / count
    mean += POLICY_LEARNING_RATE * (mean_gradient - KL * (mean - ratio))
    return max(RATIO_MIN, min(RATIO_MAX, mean)), max(1e-3, std + POLICY_LEARNING_RATE * std_gradient + ENTROPY_BONUS)


def digest(masked: Tensor) -> str:
    """A hash of masks in one row."""
    return hashlib.sha256(bytes(masked.tolist())).hexdigest()[:16]

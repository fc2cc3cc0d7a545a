"""What a session alone sees to, whoever calls it."""

from pathlib import Path

import pytest
import torch
from grasp_lora.engine.checks import check
from recorder import session_of

from grasp_lora.engine.session import Session
from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.models.adapters import fresh_adapter
from grasp_lora.models.live import adapter_weights

# Nothing moves, neither weights nor masks, so that the dev loss stops the run after the second of four epochs.
STILL = (
    "controller.preset=spread",
    "controller.policy.kind=gaussian",
    "controller.training={epochs: 4, learning_rate: 1.0e-30, patience: 1}",
    "controller.policy={ratio_min: 0.4, ratio_max: 0.401}",
)


def trained_adapter(session: Session) -> AdapterWeights:
    """An adapter that changes something."""
    with fresh_adapter(session.backbone.model, session.recipe.lora, 0) as model:
        fresh = adapter_weights(model)
    draws = torch.Generator().manual_seed(0)
    pairs = {name: LoraPair(one.A, 0.1 * torch.randn(one.B.shape, generator=draws)) for name, one in fresh.items()}
    return AdapterWeights(pairs)


def test_a_ratio_is_not_learned_from_the_round_before_training_alone(tiny_workspace: Path, tmp_path: Path) -> None:
    session = session_of(*STILL, "controller.rounds.every=15")
    assert session.recipe.controller.round_steps(len(session.splits.train))[:2] == [0, 15]
    with pytest.raises(
        GraspError, match=r"stopped by its dev loss at step 10, before a round .*controller\.rounds\.every"
    ):
        session.learn_ratio(trained_adapter(session), tmp_path / "one")


def test_a_plan_of_the_round_before_training_alone_is_followed(tiny_workspace: Path, tmp_path: Path) -> None:
    session = session_of(*STILL, "controller.rounds.every=1000")
    learned = session.learn_ratio(trained_adapter(session), tmp_path / "one")
    assert [row["step"] for row in learned.rounds] == [0]


def test_rounds_that_follow_a_step_are_enough(tiny_workspace: Path, tmp_path: Path) -> None:
    session = session_of(*STILL, "controller.rounds.every=6")
    learned = session.learn_ratio(trained_adapter(session), tmp_path / "one")
    assert [row["step"] for row in learned.rounds] == [0, 6]


def test_weights_of_a_merge_that_are_all_0_are_refused_before_anything_is_trained(tiny_workspace: Path) -> None:
    with pytest.raises(RecipeError, match=r"merge\.weights are all 0, .*give another, or leave them out"):
        check(session_of("merge={rule: lorahub, weights: [0, 0]}"))

"""Looking ahead leaves no trace in the training, and what it promises to first order is what small steps do."""

from pathlib import Path

import lookahead
import numpy as np
import pytest
from controllers_rivals import Setting
from landscape import Landscape
from record import LANDSCAPE_FILE, RecordingSettings, record

from grasp_lora.bench.session import Session
from grasp_lora.errors import GraspError
from grasp_lora.recipes.load import load_recipe

pytestmark = pytest.mark.slow

RATIOS = (0.0, 0.2, 0.4, 0.6)
EVERY = 5


@pytest.fixture
def recorded(tiny_workspace: Path) -> Landscape:
    """A landscape in the folder `recorded`."""
    settings = RecordingSettings((0.2, 0.4, 0.6), (0.4, None), RATIOS, EVERY, dev=False)
    return record(Session(*load_recipe("tiny.yaml")), Path("recorded"), settings)


def test_the_training_and_its_immediate_losses_are_those_of_a_landscape(recorded):
    before = sorted(Path("recorded/store/records").iterdir())
    recipe, base = load_recipe("tiny.yaml")
    measured = lookahead.look_ahead(recipe, base, Path("recorded"), RATIOS, EVERY, ahead=3)
    assert sorted(Path("recorded/store/records").iterdir()) == before  # no adapter was trained again
    assert tuple(measured["steps"]) == recorded.shared.steps
    assert np.array_equal(np.array(measured["immediate"]), np.mean(recorded.shared.losses, axis=2))
    assert not np.allclose(measured["after_steps"], measured["immediate"], rtol=1e-4)


def test_a_look_ahead_to_first_order_is_what_a_small_step_does(tiny_workspace):
    recipe, base = load_recipe("tiny.yaml", ["controller.training.learning_rate=1e-5"])
    measured = lookahead.look_ahead(recipe, base, Path("ahead"), RATIOS, EVERY, ahead=1)
    change = np.array(measured["after_steps"]) - np.array(measured["immediate"])
    assert np.abs(change).min() > 0
    assert np.allclose(change, measured["slope"], rtol=0.1, atol=2e-7)
    signals = lookahead.signals_of(measured)
    assert list(signals) == ["immediate", "after 1 masked steps", "first order, 1 steps", "first order, 10 steps"]
    assert np.allclose(signals["first order, 10 steps"] - signals["immediate"], 10 * np.array(measured["slope"]))


def test_every_signal_is_judged_by_the_final_runs(recorded):
    setting = Setting("tiny", recorded)
    final = [recorded.final_loss(ratio, "dev") for ratio in RATIOS]
    right = {
        "steps": [0],
        "ratios": RATIOS,
        "ahead": 2,
        "steps_per_epoch": 5,
        "immediate": [final],
        "after_steps": [final],
    }
    found = lookahead.judged(right | {"slope": [[-1.0 * loss for loss in final]]}, setting)
    assert found["immediate"]["spearman"] == [pytest.approx(1.0)]
    assert found["first order, 2 steps"]["spearman"] == [pytest.approx(-1.0)]
    assert found["immediate"]["regret_percent"][0] <= found["first order, 2 steps"]["regret_percent"][0]
    assert "| immediate | +1.00 / " in lookahead.report(right, found)


def test_too_few_examples_to_look_ahead_are_an_error(tiny_workspace):
    with pytest.raises(GraspError, match="11 steps ahead need 11 training examples; there are 10"):
        lookahead.look_ahead(*load_recipe("tiny.yaml"), Path("ahead"), RATIOS, EVERY, ahead=11)


def test_too_few_ratios_are_refused_before_the_training(recorded, capsys):
    arguments = ["--landscape", f"recorded/{LANDSCAPE_FILE}", "--folder", "ahead", "--ratios", "0.2,0.1,0.6"]
    assert lookahead.main(["tiny.yaml", *arguments]) == 2
    assert capsys.readouterr().err.startswith(
        "error: a smooth fit between 0.1 and 0.6 to ratios [0.1, 0.2, 0.6]; at least four"
    )
    assert not Path("ahead").exists()


def test_a_missing_landscape_is_one_line(tiny_workspace, capsys):
    assert lookahead.main(["tiny.yaml", "--landscape", LANDSCAPE_FILE, "--folder", "ahead"]) == 2
    assert capsys.readouterr().err.startswith("error: ")

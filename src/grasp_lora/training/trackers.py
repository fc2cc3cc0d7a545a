"""Trackers of transformers beside a training: each training is a run of its own, and a tracker that fails costs no training."""

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.method.rounds import RoundRecord
from grasp_lora.text.display import first_line

logger = logging.getLogger(__name__)

AT_BEGIN, LATER = "on_train_begin", ("on_log", "on_evaluate", "on_save", "on_train_end")


@contextmanager
def own_tracked_run(report_to: Sequence[str]) -> Iterator[None]:
    """End the run that transformers begins at Weights & Biases and leaves open: the next training would write into it."""
    wandb = importlib.import_module("wandb") if "wandb" in report_to else None
    began_before = wandb is None or wandb.run is not None  # a script's own stays open
    try:
        yield
    finally:
        if wandb is not None and not began_before and wandb.run is not None:
            wandb.finish()


def guard_trackers(trainer: Trainer, report_to: Sequence[str]) -> None:
    """Let a tracker that cannot begin end the training with one line, and one that fails later only be told of.

    Args:
        trainer: with the callbacks of the trackers.
        report_to: their names.
    """
    for name in report_to:
        for callback in trainer.callback_handler.callbacks:
            if type(callback) is INTEGRATION_TO_CALLBACK.get(name):
                setattr(callback, AT_BEGIN, _first(name, getattr(callback, AT_BEGIN)))
                failed: list[str] = []
                for event in LATER:
                    setattr(callback, event, _later(name, getattr(callback, event), failed))


def _first(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def begin(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except GraspError:
            raise
        except Exception as error:  # whatever a foreign library raises
            raise RecipeError(
                f"report_to names {name!r}, which cannot begin: {first_line(error)}; mend it, or leave it out"
            ) from error

    return begin


def _later(name: str, call: Callable[..., Any], failed: list[str]) -> Callable[..., Any]:
    def tell(*args: Any, **kwargs: Any) -> Any:
        try:
            return None if failed else call(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  # as above; the training is worth more
            failed.append(name)
            logger.warning(
                "the tracker %s failed and hears no more of this training, which goes on: %s", name, first_line(error)
            )

    return tell


def scalars_of(measured: RoundRecord) -> dict[str, float]:
    """Return a round's scalars, as trackers take them."""
    return {
        "grasp/prune_ratio": measured["ratio"],
        "grasp/policy_mean": measured["policy_mean"],
        "grasp/policy_std": measured["policy_std"],
        "grasp/best_reward": max(measured["rewards"]),
        "grasp/micro_dev_loss": fmean(measured["baseline_losses"]),
        "grasp/measured_sparsity": measured["measured_sparsity"],
    }

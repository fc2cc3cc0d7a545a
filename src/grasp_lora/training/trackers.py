"""What trackers of transformers get of a controller; at Weights & Biases each training is a run of its own."""

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

from grasp_lora.method.rounds import RoundRecord

logger = logging.getLogger(__name__)


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

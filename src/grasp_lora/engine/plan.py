"""What a run or the methods of a comparison will do at most, foretold by `check`, `compare` and the bar of a run."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from grasp_lora.engine.session import Session

# The trainings of each method; those of one name are shared.
_TO_MERGE, _IN_PAPER = {"source", "target"}, {"source", "apart"}
_TO_PRUNE = _TO_MERGE | {"controller", "final"}
TRAININGS: dict[str, set[str]] = {
    "source_only": {"source"},
    "target_only": {"apart"},
    "continued": {"source", "continued"},
    "joint": {"joint"},
    "ties": _IN_PAPER,
    "dare_ties": _IN_PAPER,
    "lorahub": _IN_PAPER,
    "merged": _TO_MERGE,
    "adaptive_merge": _IN_PAPER | {"adaptive"},
    "grid_paper": _IN_PAPER | {"paper grid"},
    "grid": _TO_MERGE | {"grid"},
    "grasp": _TO_PRUNE,
    "delivered": _TO_PRUNE | {"continued", "unpruned"},
    "grasp_paper": _IN_PAPER | {"paper controller", "paper final"},
}


def most_trained(names: Collection[str], session: Session, ratios: int = 0) -> dict[str, int]:
    """How many examples each training of some methods sees at most; that of `source` is done once, the others with each seed.

    A dev set may stop trainings early. Methods from outside are not counted.

    Args:
        ratios: of a grid.
    """
    recipe, splits = session.recipe, session.splits
    trains = {part for name in names for part in TRAININGS.get(name, ())}
    if recipe.final.prune_ratio is not None:
        trains -= {"controller"}
    if "continued" not in names and recipe.final.deliver == "grasp":
        trains -= {"continued"}
    if recipe.final.deliver != "grasp" or recipe.final.prune_ratio is not None:
        trains -= {"unpruned"}
    if list(names) == ["delivered"] and recipe.final.deliver == "continued":
        trains = {"source", "continued"}
    final, own = recipe.final.training.epochs, recipe.target.training.epochs
    if recipe.target.on is None:
        trains = (trains - {"apart"}) | ({"target"} if "apart" in trains else set())  # one and the same
    epochs = {
        **dict.fromkeys(("target", "apart"), 0 if recipe.target.adapter else own),
        "controller": recipe.controller.training.epochs,
        "paper controller": recipe.controller.training.epochs,
        "grid": ratios * final,
        "paper grid": ratios * final,
    }
    rows = max(1, round(own)) * len(splits.train)  # of the target; as many of the source
    counts = {part: round(epochs.get(part, final) * len(splits.train)) for part in sorted(trains)} | {
        "source": 0 if recipe.source.adapters else round(recipe.source.training.epochs * len(splits.source_train)),
        "joint": rows + min(rows, len(splits.source_train)),
    }
    return {part: count for part, count in counts.items() if part in trains and count}


@dataclass(frozen=True)
class Plan:
    """The work of a run.

    Args:
        trained: training -> examples that it sees.
        probed: examples that the controller's probes measure.
        systems: how many systems answer the test rows: the backbone alone, the merge, GRASP's result, the adapters before them.
    """

    trained: Mapping[str, int]
    probed: int
    systems: int


def planned(session: Session) -> Plan:
    """Plan the run of a session; a dev set may stop its trainings early."""
    recipe, probed = session.recipe, 0
    sources, deliver = max(1, len(recipe.source.adapters)), recipe.final.deliver
    learns = recipe.final.prune_ratio is None
    if learns:
        rounds = len(recipe.controller.round_steps(len(session.splits.train)))
        probed = rounds * recipe.controller.probed_examples(len(session.probe_pool))
    # `continued`, and its mean with GRASP's result; the unpruned twin.
    rivals = {"best": 2, "grasp": int(learns)}.get(deliver, 0)
    systems = 2 + sources if deliver == "continued" else 3 + sources + (recipe.target.on != "source") + rivals
    return Plan(most_trained(["delivered"], session), probed, systems)

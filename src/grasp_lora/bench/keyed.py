"""How a step of a bench gets its key, its record and its adapter."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from grasp_lora.bench.keys import plain
from grasp_lora.bench.outcomes import Adapter, facts_of, once, unique
from grasp_lora.bench.session import Session
from grasp_lora.bench.store import Store, key_of
from grasp_lora.data.splits import hash_of
from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.merging import MergeSettings, merge_rule
from grasp_lora.models.reading import read_adapter
from grasp_lora.training.settings import TrainingSettings

logger = logging.getLogger(__name__)

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # Paper: grid search
# Part of what a record is found by: raise one when a change of the code changes the result of such steps.
REVISIONS = {"training": 1, "controller": 1, "losses": 1, "scores": 1}


class Keyed:
    """What all steps of a bench have in common.

    Args:
        session: of the recipe with the seed of the bench.
        shared: of the recipe whose seed the source adapter is trained with.
        store: where finished steps are kept.
        grid: prune ratios of a grid search.
    """

    def __init__(self, session: Session, shared: Session, store: Store, grid: Sequence[float] = GRID) -> None:
        self.session = session
        self.recipe = session.recipe
        self.store = store
        self.grid = tuple(grid)
        self._shared = shared

    def _settings(self, **settings: Any) -> dict[str, Any]:
        """What decides a step that draws random numbers, with what decides all of them."""
        return plain({**self._common, "seed": self.recipe.seed, **settings})

    def _measured(self, adapter: Adapter, **settings: Any) -> dict[str, Any]:
        """What decides a measurement: no seed has a part in it."""
        return plain({**self._common, "adapter": adapter.key, **settings})

    @cached_property
    def _common(self) -> dict[str, str]:
        backbone = self.session.backbone
        quantise = {} if backbone.quantise is None else {"quantise": backbone.quantise}
        return {"backbone": backbone.fingerprint, "dtype": str(backbone.model.dtype), **quantise}

    def _data(self, *splits: str) -> str:
        return hash_of(self.session.splits, splits)

    def _trained(
        self,
        name: str,
        train: Sequence[str],
        dev: Sequence[str],
        training: TrainingSettings,
        session: Session | None = None,
        on: Adapter | None = None,
    ) -> Adapter:
        """A fresh adapter, trained on the named splits and judged on others; on top of another one, if given."""
        session = session or self.session
        train_set, dev_set = (
            [one for split in names for one in getattr(session.splits, split)] for names in (train, dev)
        )
        settings = self._settings(
            data=self._data(*train, *dev),
            revision=REVISIONS["training"],
            splits=[list(train), list(dev)],
            lora=asdict(session.recipe.lora),
            training=asdict(training),
            seed=session.recipe.seed,
            **({} if on is None else {"on": on.key}),
        )

        def work(folder: Path) -> tuple[AdapterWeights, dict[str, Any]]:
            # Every target-only variant begins as the target adapter does: they differ in what their name says alone.
            part = "source" if name == "source" else "target"
            beneath = None if on is None else on.weights
            weights, result = session.train_adapter(part, train_set, dev_set, training, folder, beneath)
            return weights, facts_of(result, training, len(train_set), len(dev_set))

        return self._adapter(name, settings, [] if on is None else [on], work)

    def _merge_settings(self, sources: int) -> MergeSettings:
        """The recipe's merge; a target adapter that was trained on the mean of the source adapters is added to that."""
        merge = self.recipe.merge
        return merge if self.recipe.target.on is None else replace(merge, weights=(*[1 / sources] * sources, 1.0))

    def _merged(self, name: str, merge: MergeSettings, parents: Sequence[Adapter], names: Sequence[str]) -> Adapter:
        decided = asdict(merge)
        del decided["dropout"]  # of the trainings that follow
        settings = {
            "merge": decided,
            "parents": [parent.key for parent in parents],
            "names": list(names),
            "seed": self.recipe.seed if merge_rule(merge.rule).draws else None,  # the others draw nothing
        }
        key = key_of(name, plain(settings))  # quick and exact, so it is never on record

        def load() -> AdapterWeights:
            return self.session.merge([parent.weights for parent in parents], names, merge)

        return Adapter(key, once(load), unique([record for parent in parents for record in parent.records]))

    def _adapter(
        self,
        name: str,
        settings: dict[str, Any],
        starts: Sequence[Adapter],
        work: Callable[[Path], tuple[AdapterWeights, dict[str, Any]]],
        *,
        trains: bool = True,
    ) -> Adapter:
        """A step that makes an adapter: on record with its facts, its weights in a folder beside the records.

        One that trains looks at the request to stop itself; any other is stopped at once.
        """

        def make(key: str, folder: Path) -> dict[str, Any]:
            weights, facts = work(folder)
            self.store.save_adapter(key, lambda draft: self.session.save(draft, weights))
            return facts

        record = self.store.get(name, settings, make, trains=trains)
        folder = self.store.adapter_folder(record.key)

        def load() -> AdapterWeights:
            try:
                return read_adapter(folder).weights
            except AdapterError as error:
                if folder.exists():  # half of it was copied, for example
                    logger.warning("%s; it is made again", error)
            self.store.get(name, settings, make, trains=trains, redo=True)
            return read_adapter(folder).weights

        earlier = [past for start in starts for past in start.records]
        return Adapter(record.key, once(load), unique([*earlier, record]), folder)

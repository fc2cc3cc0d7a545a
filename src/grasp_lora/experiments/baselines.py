"""Every method of the comparison, as a few steps on one fine-tune code, with the same splits, seeds and early stopping.

A `Bench` holds the steps of one seed. Each step is on record under a hash of what decides it and of the steps it rests on, so
methods share what they have in common, and a changed controller makes only those rows anew that rest on it. Choices are made
on the dev or micro-dev split; the one exception says so in its title.
Paper: baselines of the main table; more that a reviewer would ask for.
"""

import hashlib
import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from grasp_lora.errors import AdapterError
from grasp_lora.experiments.recipe import Recipe
from grasp_lora.experiments.records import Record, Records, key_of
from grasp_lora.experiments.session import Session, hash_of, mean, write_jsonl
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.masking import MaskSettings
from grasp_lora.method.merging import MERGE_RULES, MergeSettings
from grasp_lora.method.policy import ESTIMATE_RULES, PRESETS, PolicySettings, Round
from grasp_lora.training.adapters import LoadedAdapter, read_adapter
from grasp_lora.training.settings import TrainingSettings

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # Paper: grid search
LORAHUB_BUDGET = 40  # Huang et al. 2023: evaluations, bound of the weights and strength of the L1 term
LORAHUB_BOUND = 1.5
LORAHUB_L1 = 0.05
# Part of what a record is found by: raise one when a change of the code changes the result of such steps.
REVISIONS = {"training": 1, "controller": 1, "losses": 1, "scores": 1}
JOINT_EVALUATIONS = 4  # of the dev loss in an epoch of source and target data together


@dataclass(frozen=True)
class Adapter:
    """An adapter that a step made.

    Args:
        key: what identifies it: the key of its step, or the hash of a given adapter's file.
        load: gives the weights; trains them anew if they are not on this machine. None: the backbone alone.
        records: of all steps that led to it, in order.
    """

    key: str
    load: Callable[[], AdapterWeights | None]
    records: tuple[Record, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What one method came to with one seed.

    Args:
        losses: record with the losses of the test examples.
        scores: record with the scores of the answers to the test prompts.
        records: of every step that the method needed, shared ones included.
        prune_ratio: of the result, None where nothing is pruned.
        chosen_on: the split on which a choice was made, if one was.
        curve: for a grid, ratio -> split -> mean loss of its run.
    """

    losses: Record
    scores: Record
    records: tuple[Record, ...]
    prune_ratio: float | None = None
    chosen_on: str | None = None
    curve: Mapping[float, Mapping[str, float]] | None = None


class Bench:
    """The steps of the comparison with one seed.

    Args:
        session: of the recipe with this seed.
        shared: of the recipe whose seed the source adapter is trained with.
        records: where finished steps are kept.
        grid: prune ratios of the grid search.
    """

    def __init__(self, session: Session, shared: Session, records: Records, grid: Sequence[float] = GRID) -> None:
        self.session = session
        self.recipe = session.recipe
        self.records = records
        self.grid = tuple(grid)
        self._shared = shared

    def backbone(self) -> Adapter:
        """The backbone alone."""
        return Adapter("backbone", lambda: None)

    @cached_property
    def source(self) -> Adapter:
        """The source adapter, shared by all seeds; several given ones are averaged exactly."""
        sources = self._sources
        names = [f"source_{number}" for number in range(1, len(sources) + 1)]
        return sources[0] if len(sources) == 1 else self._merged("source", MergeSettings("exact"), sources, names)

    @cached_property
    def target(self) -> Adapter:
        """The target adapter."""
        return self._target(dev_free=False)

    def parents(self, dev_free: bool = False) -> list[Adapter]:
        """Every adapter that is merged; the target's of all epochs, without a look at the dev set, if `dev_free`."""
        return [*self._sources, self._target(dev_free=True) if dev_free else self.target]

    def merged(self, dev_free: bool = False) -> Adapter:
        """The merge of the recipe."""
        parents = self.parents(dev_free)
        return self._merged("merged", self.recipe.merge, parents, _names(parents))

    def merged_by(self, rule: str) -> Adapter:
        """The merge by another rule, with its own default weights."""
        parents = self.parents()
        return self._merged(rule, MergeSettings(rule), parents, _names(parents))

    def trained_wide(self) -> Adapter:
        """A fresh adapter on the target data, of the rank of the merge and the scaling of the recipe's adapters."""
        lora, merge = self.recipe.lora, self.recipe.merge
        given = self.session.existing_adapters
        ranks = [max(pair.rank for pair in adapter.weights.values()) for adapter in given.values()]
        ranks += [lora.rank] * (max(1, len(self.recipe.source.adapters)) + 1 - len(ranks))
        rank = sum(ranks) if merge.rule == "exact" else merge.rank or max(ranks)
        growth = rank / lora.rank
        wide = replace(lora, rank=rank, alpha=lora.alpha * (growth**0.5 if lora.rslora else growth))
        session = self.session.variant(self.recipe.model_copy(update={"lora": wide}))
        return self._trained("target-wide", ("train",), ("dev",), self.recipe.target.training, session)

    def trained_long(self) -> Adapter:
        """A fresh adapter on the target data for at most as many optimizer steps as GRASP takes on it, all stages together."""
        recipe, examples = self.recipe, len(self.session.splits.train)
        stages = [recipe.controller.training, recipe.final.training]
        if recipe.target.adapter is None:
            stages.append(recipe.target.training)
        training = recipe.target.training
        epochs = sum(stage.steps(examples) for stage in stages) / training.steps_per_epoch(examples)
        return self._trained("target-long", ("train",), ("dev",), replace(training, epochs=epochs, patience=None))

    def trained_jointly(self) -> Adapter:
        """One fresh adapter on source and target data together, the target's repeated as often as its own adapter sees it."""
        source, target = self._shared.recipe.source.training, self.recipe.target.training
        repeats = max(1, round(target.epochs / source.epochs))
        evaluate_every = min(source.evaluate_every, 1 / JOINT_EVALUATIONS)
        training = replace(source, evaluate_every=evaluate_every, patience=None, keep="best")
        return self._trained("joint", ("source_train", *["train"] * repeats), ("dev",), training)

    def finetuned(
        self, start: Adapter, prune_ratio: float, changes: Mapping[str, Any] | None = None, dev_free: bool = False
    ) -> Adapter:
        """The final run of the recipe.

        Args:
            start: the adapter it starts from.
            prune_ratio: fraction in [0, 1].
            changes: of the final stage.
            dev_free: all epochs, no dev set, the last adapter.
        """
        stage = replace(self.recipe.final, prune_ratio=None, **(changes or {}))
        if dev_free:
            stage = replace(stage, training=replace(stage.training, patience=None, keep="last"))
        settings = self._settings(
            data=self._data("train", *([] if dev_free else ["dev"])),
            revision=REVISIONS["training"],
            start=start.key,
            prune_ratio=prune_ratio,
            final=asdict(stage),
            mask=asdict(stage.mask or self.recipe.mask),
            dropout=self.recipe.lora.dropout,
            dev_free=dev_free,
        )

        def work(key: str) -> tuple[AdapterWeights, dict[str, Any]]:
            session = self.session.variant(self.recipe.model_copy(update={"final": stage}))
            weights = _loaded(start)
            dev = () if dev_free else session.splits.dev
            adapter, result, _ = session.finetune_pruned(weights, prune_ratio, self._draft(key), dev)
            return adapter, _facts(result, stage.training, len(session.splits.train), len(dev))

        return self._adapter(f"final {prune_ratio:.2f}", settings, [start], work)

    def controlled(
        self, policy: PolicySettings, probes: str = "micro_dev", dev_free: bool = False
    ) -> tuple[float, Adapter]:
        """The controller run on the merged adapter, probing on a split.

        The run does not depend on the rule that reads the ratio off its rounds, so policies that differ in the rule alone
        share it.

        Returns:
            The learned ratio, and the merged adapter with the run's record among its own: what it cost.
        """
        stage = replace(self.recipe.controller, policy=replace(policy, estimate=PolicySettings().estimate))
        merged, examples = self.merged(dev_free), getattr(self.session.splits, probes)
        settings = self._settings(
            data=self._data("train", probes),
            revision=REVISIONS["controller"],
            start=merged.key,
            controller=asdict(stage),
            mask=asdict(self.recipe.mask),
            dropout=self.recipe.lora.dropout,
            probes=probes,
        )

        def work(key: str) -> dict[str, Any]:
            from grasp_lora.training.controller import ROUNDS_FILE  # brings the Trainer, which is slow to import

            session = self.session.variant(self.recipe.model_copy(update={"controller": stage}))
            folder = self._draft(key)
            session.learn_ratio(_loaded(merged), folder, examples)
            rounds = [json.loads(line) for line in (folder / ROUNDS_FILE).read_text(encoding="utf-8").splitlines()]
            shutil.rmtree(folder)
            return {
                "rounds": rounds,
                "trained_examples": round(stage.training.epochs * len(session.splits.train)),
                "measured_examples": len(rounds) * (policy.candidates + 1) * len(examples),
            }

        record = self.records.get("controller", settings, work)
        estimate = ESTIMATE_RULES[policy.estimate](rounds_of(record), policy.ratio_min, policy.ratio_max)
        return estimate.ratio, replace(merged, records=(*merged.records, record))

    def pruned(self, start: Adapter, prune_ratio: float) -> Adapter:
        """An adapter pruned at a ratio, without training."""
        mask = asdict(self.recipe.final.mask or self.recipe.mask)
        settings = self._settings(
            data=self._data("train"),
            revision=REVISIONS["training"],
            start=start.key,
            prune_ratio=prune_ratio,
            mask=mask,
        )
        return self._adapter(
            "one-shot", settings, [start], lambda key: (self.session.prune(_loaded(start), prune_ratio), {})
        )

    def lorahub(self) -> Adapter:
        """Merge weights found without gradients on the micro-dev loss (Huang et al. 2023)."""
        parents, examples = self.parents(), len(self.session.splits.micro_dev)
        settings = self._settings(
            data=self._data("micro_dev"),
            revision=REVISIONS["training"],
            start=[parent.key for parent in parents],
            budget=LORAHUB_BUDGET,
            bound=LORAHUB_BOUND,
            l1=LORAHUB_L1,
        )

        def work(key: str) -> tuple[AdapterWeights, dict[str, Any]]:
            adapters = [_loaded(parent) for parent in parents]
            weights, evaluations = search_weights(self.session, adapters, self.recipe.seed_of("lorahub"))
            merged = self.session.merge(adapters, _names(adapters), MergeSettings("lorahub", weights))
            return merged, {"weights": list(weights), "measured_examples": evaluations * examples}

        return self._adapter("lorahub", settings, parents, work)

    def losses(self, adapter: Adapter, split: str = "test") -> Record:
        """The losses of the examples of a split: `dev`, `micro_dev` or `test`."""

        def work(key: str) -> dict[str, Any]:
            return {"losses": self.session.losses(adapter.load(), split)[split]}

        settings = self._measured(adapter, data=self._data(split), revision=REVISIONS["losses"], split=split)
        return self.records.get(f"{split} losses", settings, work)

    def scores(self, adapter: Adapter) -> Record:
        """The scores of the answers to the test prompts; the answers themselves are written beside the records."""
        recipe, session, test = self.recipe, self.session, self.session.splits.test
        generation = {"max_new_tokens": recipe.generation.max_new_tokens, "stop": recipe.generation.stop}
        asked = self._measured(adapter, data=self._data("test"), revision=REVISIONS["scores"], generation=generation)
        references = [example.references for example in test]
        settings = asked | {
            "metrics": list(session.metrics),
            "bertscore": asdict(recipe.bertscore) if "bertscore" in session.metrics else None,
            "language": session.language,
            "references": hashlib.sha256(repr(references).encode()).hexdigest(),
        }
        # Under a key of their own, so that another metric does not need new answers.
        file = self.records.folder / "predictions" / f"{key_of('answers', asked)}.jsonl"

        def work(key: str) -> dict[str, Any]:
            if not file.is_file():
                answers = session.answer(adapter.load())
                rows = [{"id": one.id, "prediction": text} for one, text in zip(test, answers, strict=True)]
                write_jsonl(file, rows)
            lines = file.read_text(encoding="utf-8").split("\n")
            answers = tuple(json.loads(line)["prediction"] for line in lines if line)
            return {name: asdict(entry) for name, entry in session.score(answers).items()}

        return self.records.get("scores", _plain(settings), work)

    def outcome(self, adapter: Adapter, prune_ratio: float | None = None, **facts: Any) -> Outcome:
        """Measure what a method came to."""
        return Outcome(self.losses(adapter), self.scores(adapter), adapter.records, prune_ratio, **facts)

    def _settings(self, **settings: Any) -> dict[str, Any]:
        """What decides a step that draws random numbers, with what decides all of them."""
        return _plain({**self._common, "seed": self.recipe.seed, **settings})

    def _measured(self, adapter: Adapter, **settings: Any) -> dict[str, Any]:
        """What decides a measurement: no seed has a part in it."""
        return _plain({**self._common, "adapter": adapter.key, **settings})

    @cached_property
    def _common(self) -> dict[str, str]:
        backbone = self.session.backbone
        return {"backbone": backbone.fingerprint, "dtype": str(backbone.model.dtype)}

    def _data(self, *splits: str) -> str:
        return hash_of(self.session.splits, splits)

    @cached_property
    def _sources(self) -> list[Adapter]:
        recipe, session = self._shared.recipe, self._shared
        if recipe.source.adapters:
            return [_given(session.existing_adapters[place]) for place in recipe.source.adapters]
        return [self._trained("source", ("source_train",), ("source_dev",), recipe.source.training, session)]

    def _target(self, dev_free: bool) -> Adapter:
        recipe = self.recipe
        if recipe.target.adapter is not None:
            return _given(self.session.existing_adapters[recipe.target.adapter])
        if not dev_free:
            return self._trained("target", ("train",), ("dev",), recipe.target.training)
        return self._trained("target", ("train",), (), replace(recipe.target.training, patience=None, keep="last"))

    def _trained(
        self,
        name: str,
        train: Sequence[str],
        dev: Sequence[str],
        training: TrainingSettings,
        session: Session | None = None,
    ) -> Adapter:
        """A fresh adapter, trained on the named splits and judged on others."""
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
        )

        def work(key: str) -> tuple[AdapterWeights, dict[str, Any]]:
            # Every target-only variant begins as the target adapter does: they differ in what their name says alone.
            part = "source" if name == "source" else "target"
            weights, result = session.train_adapter(part, train_set, dev_set, training, self._draft(key))
            return weights, _facts(result, training, len(train_set), len(dev_set))

        return self._adapter(name, settings, [], work)

    def _merged(self, name: str, merge: MergeSettings, parents: Sequence[Adapter], names: Sequence[str]) -> Adapter:
        settings = {
            "merge": asdict(merge),
            "parents": [parent.key for parent in parents],
            "names": list(names),
            "seed": self.recipe.seed if merge.rule.startswith("dare") else None,  # the others draw nothing
        }
        key = key_of(name, _plain(settings))  # quick and exact, so it is never on record

        def load() -> AdapterWeights:
            return self.session.merge([_loaded(parent) for parent in parents], names, merge)

        return Adapter(key, _once(load), _unique([record for parent in parents for record in parent.records]))

    def _adapter(
        self,
        name: str,
        settings: dict[str, Any],
        starts: Sequence[Adapter],
        work: Callable[[str], tuple[AdapterWeights, dict[str, Any]]],
    ) -> Adapter:
        """A step that makes an adapter: on record with its facts, its weights in a folder beside the records."""

        def make(key: str) -> dict[str, Any]:
            weights, facts = work(key)
            draft, folder = self._draft(key), self._folder(key)
            self.session.save(draft, weights)
            if folder.exists():
                shutil.rmtree(folder)
            draft.rename(folder)  # whole or not there: a kill may come at any moment
            return facts

        record = self.records.get(name, settings, make)
        folder = self._folder(record.key)

        def load() -> AdapterWeights:
            if not (folder / "adapter_config.json").is_file():
                self.records.get(name, settings, make, redo=True)
            return read_adapter(folder).weights

        earlier = [past for start in starts for past in start.records]
        return Adapter(record.key, _once(load), _unique([*earlier, record]))

    def _folder(self, key: str) -> Path:
        return self.records.folder / "adapters" / key

    def _draft(self, key: str) -> Path:
        return self.records.folder / "adapters" / f"{key}.part"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        title: as the table prints it.
        run: does what is not on record yet.
        units: rough cost in final runs, for the time left.
        unavailable: why it cannot run with this recipe here, or None.
        warning: what a reader has to be told of it.
    """

    title: str
    run: Callable[[Bench], Outcome]
    units: float = 1.0
    unavailable: Callable[[Session], str | None] = lambda session: None
    warning: str | None = None


def search_weights(session: Session, adapters: Sequence[AdapterWeights], seed: int) -> tuple[tuple[float, ...], int]:
    """Search one weight per adapter without gradients: mean micro-dev loss plus an L1 term (LoRAHub, Huang et al. 2023).

    Returns:
        The weights, and how many were tried.
    """
    import nevergrad
    import numpy

    space = nevergrad.p.Array(init=[0.0] * len(adapters), lower=-LORAHUB_BOUND, upper=LORAHUB_BOUND)
    space.random_state = numpy.random.RandomState(seed)
    search = nevergrad.optimizers.NGOpt(parametrization=space, budget=LORAHUB_BUDGET)
    with warnings.catch_warnings():
        # Of the optimisers that it chooses among, about their own defaults: nothing that a user could act on.
        warnings.filterwarnings("ignore", module="scipy|nevergrad|cma")
        for _ in range(LORAHUB_BUDGET):
            tried = search.ask()
            weights = tuple(float(weight) for weight in tried.value)
            merged = session.merge(adapters, _names(adapters), MergeSettings("lorahub", weights))
            loss = mean(session.losses(merged, "micro_dev")["micro_dev"])
            search.tell(tried, loss + LORAHUB_L1 * mean([abs(weight) for weight in weights]))
        best = search.provide_recommendation()
    return tuple(float(weight) for weight in best.value), LORAHUB_BUDGET


def _run_grid(
    choose_on: str, final: Mapping[str, Any] | None = None, dev_free: bool = False
) -> Callable[[Bench], Outcome]:
    """A grid search: one final run per ratio, the best of them by the mean loss on a split."""

    def run(bench: Bench) -> Outcome:
        merged = bench.merged(dev_free)
        runs = {ratio: bench.finetuned(merged, ratio, final, dev_free) for ratio in bench.grid}
        splits = dict.fromkeys((choose_on, "test"))
        curve = {
            ratio: {split: mean(bench.losses(adapter, split).result["losses"]) for split in splits}
            for ratio, adapter in runs.items()
        }
        best = min(curve, key=lambda ratio: curve[ratio][choose_on])
        records = _unique([record for adapter in runs.values() for record in adapter.records])
        outcome = bench.outcome(runs[best], best, chosen_on=choose_on, curve=curve)
        return replace(outcome, records=records)

    return run


def _run_grasp(
    policy: Callable[[Recipe], PolicySettings],
    probes: str = "micro_dev",
    final: Mapping[str, Any] | None = None,
    dev_free: bool = False,
) -> Callable[[Bench], Outcome]:
    """GRASP: learn the ratio in one controller run, then one final run."""

    def run(bench: Bench) -> Outcome:
        ratio, merged = bench.controlled(policy(bench.recipe), probes, dev_free)
        adapter = bench.finetuned(merged, ratio, final, dev_free)
        return bench.outcome(adapter, ratio, chosen_on=probes)

    return run


def _one_shot(bench: Bench) -> Outcome:
    ratio, merged = bench.controlled(bench.recipe.controller.policy)
    return bench.outcome(bench.pruned(merged, ratio), ratio, chosen_on="micro_dev")


def _own_policy(recipe: Recipe) -> PolicySettings:
    return recipe.controller.policy


def _random_policy(recipe: Recipe) -> PolicySettings:
    """The recipe's own policy, but with uniform candidates and nothing learned."""
    return replace(recipe.controller.policy, kind="uniform")


def _preset_policy(name: str) -> Callable[[Recipe], PolicySettings]:
    """A preset within the recipe's own bounds, with its number of candidates."""

    def policy(recipe: Recipe) -> PolicySettings:
        own = recipe.controller.policy
        return replace(
            PRESETS[name],
            ratio_min=own.ratio_min,
            ratio_max=own.ratio_max,
            ratio_init=own.ratio_init,
            candidates=own.candidates,
        )

    return policy


def _needs_source(session: Session) -> str | None:
    return None if session.splits.source_train else "needs data.source, the recipe gives source adapters only"


def _needs_dev(session: Session) -> str | None:
    return None if session.splits.dev else "needs a dev split, data.target.dev is 0"


def _needs_equal_ranks(rule: str) -> Callable[[Session], str | None]:
    def unavailable(session: Session) -> str | None:
        ranks = {pair.rank for adapter in session.existing_adapters.values() for pair in adapter.weights.values()}
        recipe = session.recipe
        if not (recipe.source.adapters and recipe.target.adapter):
            ranks.add(recipe.lora.rank)
        if MERGE_RULES[rule].equal_ranks and len(ranks) > 1:
            return f"merge rule {rule!r} needs equal ranks, the adapters have {sorted(ranks)}"
        if rule == "lorahub" and importlib.util.find_spec("nevergrad") is None:
            return "needs nevergrad: pip install 'grasp-lora[compare]'"
        return None

    return unavailable


PAPER_FINAL = {"mode": "reselect", "mask": MaskSettings(score="gradient_of_delta")}  # Paper: adaptive LoRA merge

METHODS: dict[str, Method] = {
    "zero_shot": Method("zero shot", lambda bench: bench.outcome(bench.backbone()), 0.3),
    "source_only": Method("source only", lambda bench: bench.outcome(bench.source)),
    "target_only": Method("target only (LoRA)", lambda bench: bench.outcome(bench.target)),
    "target_wide": Method("target only, rank of the merge", lambda bench: bench.outcome(bench.trained_wide())),
    "target_long": Method("target only, steps of GRASP", lambda bench: bench.outcome(bench.trained_long()), 4),
    "continued": Method(
        "source adapter continued on the target",
        lambda bench: bench.outcome(bench.finetuned(bench.source, 0.0)),
    ),
    "joint": Method(
        "source and target data together", lambda bench: bench.outcome(bench.trained_jointly()), 4, _needs_source
    ),
    "ties": Method("TIES", lambda bench: bench.outcome(bench.merged_by("ties")), 0.3, _needs_equal_ranks("ties")),
    "dare_ties": Method(
        "DARE-TIES", lambda bench: bench.outcome(bench.merged_by("dare_ties")), 0.3, _needs_equal_ranks("dare_ties")
    ),
    "lorahub": Method("LoRAHub", lambda bench: bench.outcome(bench.lorahub()), 2, _needs_equal_ranks("lorahub")),
    "merged": Method("merged, not trained", lambda bench: bench.outcome(bench.merged()), 0.3),
    "adaptive_merge": Method(
        "adaptive LoRA merge", lambda bench: bench.outcome(bench.finetuned(bench.merged(), 0.0), 0.0)
    ),
    "grid_paper": Method("adaptive LoRA merge + pruning, grid", _run_grid("dev", final=PAPER_FINAL), 10, _needs_dev),
    "grid": Method("grid of GRASP's final runs", _run_grid("dev"), 8, _needs_dev),
    "grid_16": Method("the same grid, 16 examples choose", _run_grid("micro_dev"), 0.3, _needs_dev),
    "grasp": Method("GRASP", _run_grasp(_own_policy), 5),
    "grasp_default": Method("GRASP, preset default", _run_grasp(_preset_policy("default")), 5),
    "grasp_paper": Method("GRASP, preset paper", _run_grasp(_preset_policy("paper"), final=PAPER_FINAL), 2),
    "grasp_random": Method("GRASP, random candidates", _run_grasp(_random_policy), 5),
    "grasp_50": Method("GRASP probing the dev set", _run_grasp(_own_policy, "dev"), 10, _needs_dev),
    "one_shot": Method("pruned at the learned ratio, not trained", _one_shot, 0.3),
    "merge_dev_free": Method(
        "adaptive LoRA merge without a dev set",
        lambda bench: bench.outcome(bench.finetuned(bench.merged(dev_free=True), 0.0, dev_free=True), 0.0),
        2,
    ),
    "grid_dev_free": Method("grid without a dev set", _run_grid("micro_dev", dev_free=True), 12),
    "grasp_dev_free": Method("GRASP without a dev set", _run_grasp(_own_policy, dev_free=True), 6),
    "grid_oracle": Method(
        "grid chosen on the TEST set",
        _run_grid("test"),
        0.3,
        warning="chooses its ratio on the test split: a bound on what any choice could reach, no fair method",
    ),
}
# The preset default is what a recipe has unless it says otherwise, and the oracle is not fair.
DEFAULT_METHODS = tuple(name for name in METHODS if name not in ("grasp_default", "grid_oracle"))


def rounds_of(record: Record) -> list[Round]:
    """Return the rounds of a controller run that is on record."""
    return [
        Round(
            row["ratio_before"],
            tuple(row["candidates"]),
            tuple(row["baseline_losses"]),
            tuple(tuple(losses) for losses in row["candidate_losses"]),
        )
        for row in record.result["rounds"]
    ]


def _given(adapter: LoadedAdapter) -> Adapter:
    # The file of weights does not hold the scaling, which decides as much.
    facts = {
        name: [pair.scaling, [[one.name, one.rank] for one in pair.segments]] for name, pair in adapter.weights.items()
    }
    return Adapter(key_of("given", {"sha256": adapter.sha256, "facts": facts}), lambda: adapter.weights)


def _loaded(adapter: Adapter) -> AdapterWeights:
    weights = adapter.load()
    if weights is None:
        raise AdapterError("the backbone alone cannot be merged, pruned or trained on; name an adapter")
    return weights


def _names(adapters: Sequence[Any]) -> tuple[str, ...]:
    sources = len(adapters) - 1
    return (*("source" if number == 0 else f"source_{number + 1}" for number in range(sources)), "target")


def _facts(result: Any, training: TrainingSettings, train_examples: int, dev_examples: int) -> dict[str, Any]:
    """What a fine-tune did and cost, as plain values."""
    epochs = result.steps / training.steps_per_epoch(train_examples)
    return {
        "steps": result.steps,
        "best_step": result.best_step,
        "dev_loss": result.dev_loss,
        "trained_examples": round(epochs * train_examples),
        "measured_examples": sum("dev_loss" in row for row in result.history) * dev_examples,
        "history": result.history,
    }


def _unique(records: Sequence[Record]) -> tuple[Record, ...]:
    return tuple({record.key: record for record in records}.values())


def _once(load: Callable[[], AdapterWeights]) -> Callable[[], AdapterWeights]:
    """Load at the first call, and keep it."""
    kept: list[AdapterWeights] = []

    def loaded() -> AdapterWeights:
        if not kept:
            kept.append(load())
        return kept[0]

    return loaded


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The same as JSON gives it back: lists for tuples."""
    return {key: _plain_value(value) for key, value in settings.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain_value(entry) for key, entry in value.items()}
    return [_plain_value(entry) for entry in value] if isinstance(value, list | tuple) else value

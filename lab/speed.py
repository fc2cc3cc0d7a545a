"""What everything around the method costs: one table of ratios, all measured in one run.

    python lab/speed.py mlqa-ar --set data.root=FOLDER --policy paper@10 --output speed.json
    python lab/speed.py demo-ar --only step,probe --profile

The sides of a ratio take turns, and a figure is the median over the turns with its range, since machines are shared and
noisy. Adapters are random ones of the recipe's rank, merged by its rule. What each row means: lab/speed.md.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed_figures import Row, child, clock_of, peak_megabytes, profile, row, share_table, table, take_turns
from speed_lab import RATIO, Lab, length, taken

from grasp_lora.data.encode import Example
from grasp_lora.engine.steps import GRID
from grasp_lora.method.masks import MaskSet
from grasp_lora.method.search import preset
from grasp_lora.models import generation
from grasp_lora.models.backbone import supports_logits_to_keep
from grasp_lora.models.generation import answer
from grasp_lora.models.live import live_pairs, segments_of
from grasp_lora.models.loss import collate, example_losses
from grasp_lora.recipes.load import load_recipe
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.stages import ControllerStage
from grasp_lora.training.probes import ProbeSet, calibrate
from grasp_lora.training.training_settings import TrainingSettings

CANDIDATES, MICRO_DEV, RANKS, ADAPTERS = (1, 3, 6), (4, 16), (4, 16, 64), (2, 4)
BUDGETS = (256, 512, 1024, 4096, 8192)
STACKS = (2, 8)  # final runs
PROFILED = 4  # examples under the profiler, which is slow and holds every event
MEMORY_KINDS = ("plain", "plain with dev", "controller", "final")
MEMORY_STEPS, MEMORY_PAIRS = 2, 2
COMMAND = "from grasp_lora.cli import main; main()"


def step(lab: Lab) -> list[Row]:
    """One epoch of our fine-tune over a bare loop on the same examples, one example a step in both."""
    train, training = taken(lab.session.splits.train, lab.examples), one_by_one(lab.recipe)
    with lab.on() as model:
        label_positions = supports_logits_to_keep(model)

        def bare() -> None:
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
            model.train()
            for example in train:
                batch = {name: part.to(lab.device) for name, part in collate([example], lab.session.pad_id).items()}
                example_losses(model, batch, label_positions=label_positions).mean().backward()
                if training.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            model.eval()

        works = {"ours": lambda: lab.epoch(model, train, training), "bare": lambda: lab.clocked(bare)}
        times = take_turns(works, lab.pairs)
    return [row("step", f"fine-tune / bare loop, {len(train)} examples", times["ours"], times["bare"])]


def probe(lab: Lab) -> list[Row]:
    """Masks on, losses of the micro-dev examples, weights back, over the forward pass up to the last hidden state."""
    probes = ProbeSet(probed(lab))
    with lab.on() as model:
        masks = MaskSet(live_pairs(model, segments_of(lab.merged)), lab.recipe.mask)
        calibrate(model, masks, probes)
        ranking, decoder = masks.rank(), decoder_of(model)

        def ours() -> None:
            with masks.probe(RATIO, ranking):
                probes.losses(model)

        @torch.no_grad()
        def forward() -> None:
            model.eval()
            batch = collate(probed(lab), lab.session.pad_id)
            inputs = {name: batch[name].to(lab.device) for name in ("input_ids", "attention_mask")}
            decoder(**inputs, use_cache=False)

        times = take_turns({"ours": lambda: lab.clocked(ours), "forward": lambda: lab.clocked(forward)}, lab.pairs)
    return [row("probe", f"probe / pure forward, {len(probes)} examples", times["ours"], times["forward"])]


def formats(lab: Lab) -> list[Row]:
    """A fine-tune's epoch and the micro-dev losses in float32 over the same in bfloat16, on one backbone that is cast in turn."""
    train, training = taken(lab.session.splits.train, lab.examples), one_by_one(lab.recipe)
    probes, backbone = ProbeSet(probed(lab)), lab.session.backbone.model
    own = backbone.dtype

    def timed(dtype: torch.dtype, work: Callable[[Any], float]) -> float:
        backbone.to(dtype)
        with lab.on() as model:
            return work(model)

    def a_step(model: Any) -> float:
        return lab.epoch(model, train, training)

    def a_pass(model: Any) -> float:
        return lab.clocked(lambda: probes.losses(model))

    rows = []
    for what, work in (("fine-tune step", a_step), ("pass without gradient", a_pass)):
        kinds = {"bfloat16": torch.bfloat16, "float32": torch.float32}
        times = take_turns({name: partial(timed, dtype, work) for name, dtype in kinds.items()}, lab.pairs)
        rows.append(row("formats", f"{what}, float32 / bfloat16", times["float32"], times["bfloat16"]))
    backbone.to(own)
    return rows


def answers(lab: Lab) -> list[Row]:
    """Answers to test prompts over the forward pass of these prompts; answers with losses over answers and losses apart."""
    rows, backbone = taken(lab.session.splits.test, lab.examples), lab.session.backbone
    ends, prompts = {row.completion_ids[-1] for row in rows}, [row.prompt_ids for row in rows]
    right, probes = [row.completion_ids for row in rows], ProbeSet(rows)
    given = [adapter.weights.together() for adapter in lab.session.given.values()]
    with lab.on(given[0] if given else None) as model:  # a random adapter seldom ends its answers
        decoder = decoder_of(model)

        @torch.no_grad()
        def prefill() -> None:
            model.eval()
            for prompt in prompts:
                decoder(input_ids=torch.tensor([prompt]).to(lab.device), use_cache=False)

        def ours() -> None:
            answer(model, backbone.tokenizer, prompts, lab.recipe.generation, ends=ends)

        def measured() -> None:
            answer(model, backbone.tokenizer, prompts, lab.recipe.generation, ends=ends, right=right)

        works = {"ours": ours, "prefill": prefill, "measured": measured, "losses": lambda: probes.losses(model)}
        times = take_turns({name: partial(lab.clocked, work) for name, work in works.items()}, lab.pairs)
    apart = [sum(both) for both in zip(times["ours"], times["losses"], strict=True)]
    return [
        row("answers", f"answers / pure prefill, {len(rows)} prompts", times["ours"], times["prefill"]),
        row("answers", "answers with losses / answers, then losses", times["measured"], apart),
    ]


def batches(lab: Lab) -> list[Row]:
    """Losses of the test examples in batches of so many tokens over those in our batches."""
    examples = lab.session.splits.test
    probes, usual = ProbeSet(examples), generation.READ_TOKENS

    def measured(budget: int) -> None:
        generation.READ_TOKENS = budget
        probes.losses(model)

    with lab.on() as model:
        works = {str(one): partial(lab.clocked, partial(measured, one)) for one in (*BUDGETS, usual)}
        try:
            times = take_turns(works, lab.pairs)
        finally:
            generation.READ_TOKENS = usual
    ours = f"{usual} tokens a batch, {len(examples)} examples"
    return [row("batches", f"{one} / {ours}", times[str(one)], times[str(usual)]) for one in BUDGETS]


def controller(lab: Lab) -> list[Row]:
    """Controller runs over the same training without one, as run and over the recipe's whole length."""
    parts, rows = lab.parts, []
    training = parts.whole_training()
    with_dev = [one + other for one, other in zip(training, parts.dev_evaluations(), strict=True)]
    for name, runs in parts.controlled.items():
        size, whole = f"{parts.timed} examples, {runs[0].rounds} rounds", parts.whole_controller(name)
        seconds, in_rounds = [run.seconds for run in runs], [run.round_seconds for run in runs]
        rows += [
            row("controller", f"controller run ({name}) / training without, {size}", seconds, parts.plain),
            row("controller", f"its rounds / controller run ({name}), {size}", in_rounds, seconds),
            row(
                "controller", f"controller run ({name}) / training without, all epochs", whole, training, computed=True
            ),
            row(
                "controller", f"controller run ({name}) / training with dev, all epochs", whole, with_dev, computed=True
            ),
        ]
    return rows


def end_to_end(lab: Lab) -> list[Row]:
    """The grid, or as many trials of Optuna, over controller and final run."""
    final, trials, rows = lab.parts.whole_final(), len(GRID), []
    grid = [trials * seconds for seconds in final]
    rivals = f"grid of {trials}, or Optuna at {trials} trials"
    for name in lab.stages:
        ours = [one + other for one, other in zip(lab.parts.whole_controller(name), final, strict=True)]
        what = f"{rivals} / controller run ({name}) + final run"
        note = f"in passes {lab.parts.work_ratio(name):.2f}"
        rows.append(row("end to end", what, grid, ours, computed=True, note=note))
    return rows


def growth(lab: Lab) -> list[Row]:
    """What a round on the micro-dev set costs beside the same when one thing differs."""
    stage, splits, rank = lab.recipe.controller, lab.session.splits, lab.recipe.lora.rank
    policy, micro_dev = stage.policy, splits.micro_dev
    pool = sorted((*splits.train, *splits.dev, *micro_dev), key=length)
    third = max(1, len(pool) // 3)
    thirds = {"shortest third": pool[:third], "longest third": pool[-third:]}

    def a_round(**changed: Any) -> Callable[[], float]:
        how = {"probes": micro_dev} | changed
        rounds = replace(stage, rounds=replace(stage.rounds, every=1), policy=how.pop("policy", policy))

        def work() -> float:
            run = lab.controlled(pool[:1], rounds, **how)  # the cheapest training that has a round
            return run.round_seconds / run.rounds

        return work

    def probing(examples: Sequence[Example]) -> Callable[[], float]:
        return a_round(probes=taken(examples, len(micro_dev)))

    groups: dict[str, dict[str, Callable[[], float]]] = {
        f"candidates, own {policy.candidates}": {
            str(one): a_round(policy=replace(policy, candidates=one)) for one in CANDIDATES
        },
        f"micro-dev examples, own {len(micro_dev)}": {
            str(one): a_round(probes=taken(micro_dev, one)) for one in MICRO_DEV
        },
        f"rank of an adapter, own {rank}": {str(one): a_round(weights=lab.adapter(one, lab.adapters)) for one in RANKS},
        f"adapters, own {lab.adapters}": {str(one): a_round(weights=lab.adapter(rank, one)) for one in ADAPTERS},
        f"tokens of an example, own {mean_length(micro_dev):.0f}": {
            f"{mean_length(examples):.0f} ({name})": probing(examples) for name, examples in thirds.items()
        },
    }
    rows = []
    for title, works in groups.items():
        times = take_turns({"own": a_round(), **works}, lab.pairs)
        rows += [row("round", f"{title}: {name} / own", times[name], times["own"]) for name in works]
    return rows


def memory(lab: Lab) -> list[Row]:
    """Peak memory of a few steps on the longest examples over that of a plain fine-tune, each in its own process."""

    def peak(kind: str) -> dict[str, float]:
        _, output = child([str(Path(__file__)), *lab.arguments, "--memory-of", kind])
        found: dict[str, float] = json.loads(output.splitlines()[-1])
        return found

    works = {kind: partial(peak, kind) for kind in MEMORY_KINDS}
    found = take_turns(works, min(lab.pairs, MEMORY_PAIRS), warm_up=False)
    peaks = {kind: [one["peak"] for one in found[kind]] for kind in MEMORY_KINDS}
    plain, *others = MEMORY_KINDS
    note = f"loading alone {statistics.median(one['loaded'] for one in found[plain]):.0f} MB"
    return [row("memory", f"{kind} / plain", peaks[kind], peaks[plain], unit="MB", note=note) for kind in others]


def memory_of(lab: Lab, kind: str) -> dict[str, float]:
    """Do a few steps in this process and return its peak in MB, after loading and at the end."""
    splits, stage, final = lab.session.splits, lab.recipe.controller, lab.recipe.final.training
    training = stage.training if kind == "controller" else final
    longest = sorted(splits.train, key=length, reverse=True)
    train = taken(longest, training.batch_size * training.accumulation * MEMORY_STEPS)
    loaded = peak_megabytes()
    if kind == "controller":
        lab.controlled(train, replace(stage, rounds=replace(stage.rounds, every=MEMORY_STEPS)))
    else:
        callbacks = [lab.pruning()] if kind == "final" else []
        lab.trained(train, training, dev=() if kind == "plain" else splits.dev, callbacks=callbacks)
    return {"loaded": loaded, "peak": max(loaded, peak_megabytes())}  # Linux counts roughly: a peak may seem to fall


def start_up(lab: Lab) -> list[Row]:
    """Wall time of commands, each in its own process, over that of importing the libraries."""
    commands = {
        "python -c pass": ("-c", "pass"),
        "grasp-lora --help": ("-c", COMMAND, "--help"),
        "grasp-lora check": ("-c", COMMAND, "check", *lab.arguments),
        "libraries": ("-c", "import torch, transformers"),
    }

    def seconds(name: str) -> float:
        return child(commands[name])[0]

    times = take_turns({name: partial(seconds, name) for name in commands}, lab.pairs)
    libraries = times.pop("libraries")
    return [
        row("start-up", f"{name} / import torch, transformers", own, libraries, note=f"{statistics.median(own):.2f} s")
        for name, own in times.items()
    ]


def decoder_of(model: Any) -> Any:
    """The part of a PEFT causal language model below its head."""
    return model.get_base_model().get_decoder()


def one_by_one(recipe: Recipe) -> TrainingSettings:
    """The final run's training with one example a step."""
    return replace(recipe.final.training, batch_size=1, accumulation=1)


def probed(lab: Lab) -> Sequence[Example]:
    """The micro-dev examples, or the dev set of a recipe without them."""
    return lab.session.splits.micro_dev or lab.session.splits.dev


def mean_length(examples: Sequence[Example]) -> float:
    """Tokens of an example, on average."""
    return statistics.mean(map(length, examples))


MEASURES: dict[str, Callable[[Lab], list[Row]]] = {
    "start": start_up,
    "memory": memory,
    "step": step,
    "formats": formats,
    "probe": probe,
    "answers": answers,
    "batches": batches,
    "controller": controller,
    "end": end_to_end,
    "growth": growth,
}
DEFAULT = ("step", "formats", "probe", "answers", "controller", "end")


def main(given: Sequence[str] | None = None) -> None:
    """Measure, write the tables to standard output and all figures to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="a.b=value, of the recipe")
    parser.add_argument(
        "--only",
        default=",".join(DEFAULT),
        help=f"any of {', '.join(MEASURES)}; {', '.join(DEFAULT)} by default",
    )
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="PRESET[@STEPS]",
        help="a controller beside the recipe's own that probes the micro-dev set, every so many steps",
    )
    parser.add_argument("--pairs", type=int, default=5, help="turns of each measurement")
    parser.add_argument("--examples", type=int, default=24, help="training examples in a timed epoch")
    parser.add_argument("--profile", action="store_true", help="where the time of a fine-tune step goes")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    parser.add_argument("--memory-of", choices=MEMORY_KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    names = options.only.split(",")
    if unknown := [name for name in names if name not in MEASURES]:
        parser.error(f"--only names {', '.join(unknown)}; allowed: {', '.join(MEASURES)}")
    if min(options.pairs, options.examples) < 1:
        parser.error(f"--pairs is {options.pairs} and --examples {options.examples}; both must be at least 1")
    recipe, base = load_recipe(options.recipe, options.overrides)
    arguments = [options.recipe, *(part for override in options.overrides for part in ("--set", override))]
    try:
        stages = {"the recipe's": recipe.controller} | {text: stage_of(recipe, text) for text in options.policy}
    except ValueError as error:
        parser.error(str(error))
    lab = Lab(recipe, base, arguments, options.examples, options.pairs, stages)
    if options.memory_of:
        sys.stdout.write(json.dumps(memory_of(lab, options.memory_of)) + "\n")
        return
    content = measure(lab, [name for name in MEASURES if name in names], profiled=options.profile)
    if options.output:
        options.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def stage_of(recipe: Recipe, text: str) -> ControllerStage:
    """Read `PRESET` or `PRESET@STEPS`: the recipe's controller run with that policy, probing the micro-dev set.

    Raises:
        ValueError: there is no such preset, or the steps are no number above 0.
    """
    name, _, steps = text.partition("@")
    if steps and not steps.isdecimal():
        raise ValueError(f"--policy {text}: {steps!r} is no number of steps; write PRESET or PRESET@STEPS")
    chosen, every = preset(name), int(steps) if steps else recipe.controller.rounds.every
    rounds = replace(chosen.rounds, every=every, pool="micro_dev", in_turn=None, patience=None)
    return replace(recipe.controller, policy=chosen.policy, rounds=rounds, rule=chosen.rule)


def measure(lab: Lab, names: Sequence[str], *, profiled: bool = False) -> dict[str, Any]:
    """Take the named measurements, write the tables to standard output, and return all figures."""
    rows = [one for name in names for one in MEASURES[name](lab)]
    sys.stdout.write(table(rows) + "".join(f"\n{note}\n" for note in lab.notes))
    content: dict[str, Any] = {"recipe": lab.recipe.name, "rows": [asdict(one) for one in rows], "notes": lab.notes}
    if profiled:
        train, training = taken(lab.session.splits.train, PROFILED), one_by_one(lab.recipe)
        vocabulary = lab.session.backbone.model.get_output_embeddings().weight.shape[0]
        with lab.on() as model:
            lab.epoch(model, train, training)
            content["profile"] = profile(lambda: lab.epoch(model, train, training), vocabulary)
        sys.stdout.write("\n" + share_table(content["profile"]))
    content |= {"pairs": lab.pairs, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if "session" in vars(lab):  # not where all that was measured are child processes
        backbone = lab.session.backbone
        content |= {"backbone": backbone.name, "dtype": str(backbone.model.dtype), "device": str(lab.device)}
        content |= {"clock": clock_of(lab.device)[0], "mean_train_tokens": mean_length(lab.session.splits.train)}
    return content


if __name__ == "__main__":
    main()

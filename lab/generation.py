"""What answering the test prompts costs: by batch size, in the language model head, and beside the training of a run.

    python lab/generation.py mlqa-ar --set data.root=FOLDER

Seconds are those of one machine on one day; the ratios are what travels. On a CPU with one thread (OMP_NUM_THREADS=1) the
process's own time counts, so that other work on the machine disturbs little; otherwise wall-clock time does.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grasp_lora.bench.checks import check
from grasp_lora.bench.session import Session
from grasp_lora.models import generation
from grasp_lora.models.adapters import attached, fresh_adapter
from grasp_lora.models.generation import Reader, generate
from grasp_lora.recipes.load import load_recipe
from grasp_lora.training.finetune import finetune
from grasp_lora.training.probes import ProbeSet


def main() -> None:
    """Measure and write one JSON object to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--examples", type=int, default=32, help="test prompts to answer")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--repeats", type=int, default=2, help="the fastest counts")
    parser.add_argument("--adapter", type=Path, help="a PEFT adapter on the backbone, for realistic answers")
    parser.add_argument("--training-examples", type=int, default=16, help="examples to time a training step on")
    arguments = parser.parse_args()
    recipe, base = load_recipe(arguments.recipe, arguments.overrides)
    session = Session(recipe, base)
    check(session, parents=False)
    # The backbone has the adapter in place, so what is measured is called as it is without one.
    adapter = attached(session.backbone.model, session.read(arguments.adapter).weights) if arguments.adapter else None
    with adapter or nullcontext():
        print(json.dumps(measure(session, arguments), indent=1))  # noqa: T201


def measure(session: Session, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return seconds an example and the ratios."""
    recipe = session.recipe
    prompts = [example.prompt_ids for example in session.splits.test[: arguments.examples]]
    model, tokenizer = session.backbone.model, session.backbone.tokenizer
    own_time = model.device.type == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if own_time else wall_time
    rows, staying = {}, {}
    for size in arguments.batch_sizes:
        settings = replace(recipe.generation, batch_size=size)
        work = partial(generate, model, tokenizer, prompts, settings)
        with timed(model, now) as clock:
            best = min((run(clock, work) for _ in range(arguments.repeats)), key=lambda parts: parts.total)
            with rows_that_stay():
                whole = min((run(clock, work) for _ in range(arguments.repeats)), key=lambda parts: parts.total)
        staying[str(size)] = round(whole.total / best.total, 2)
        rows[str(size)] = {
            "seconds_per_example": round(best.total / len(prompts), 4),
            "head_share": round(best.head / best.total, 3),
            "prefill_share": round(best.prefill / best.total, 3),
            "forward_passes": best.passes,
        }
    per_example = rows[str(arguments.batch_sizes[-1])]["seconds_per_example"]
    step = math.nan if arguments.adapter else training_step(session, arguments.training_examples, now)
    training = recipe.final.training
    longest = training.epochs * len(session.splits.train)
    generation_seconds = per_example * len(session.splits.test)
    return {
        "backbone": session.backbone.name,
        "vocabulary": model.config.get_text_config(decoder=True).vocab_size,
        "clock": "process" if own_time else "wall",
        "threads": torch.get_num_threads(),
        "prompts": len(prompts),
        "mean_prompt_tokens": round(sum(map(len, prompts)) / len(prompts), 1),
        "max_new_tokens": recipe.generation.max_new_tokens,
        "by_batch_size": rows,
        "with_ended_rows_in_the_batch_over_without": staying,
        "evaluation": evaluation(session, arguments.examples, now),
        "training_seconds_per_example": round(step, 4),
        "answering_an_example_over_training_on_one": round(per_example / step, 2),
        "test_split_over_one_epoch": round(generation_seconds / (step * len(session.splits.train)), 2),
        "test_split_over_a_final_run_without_early_stopping": round(generation_seconds / (step * longest), 2),
    }


def evaluation(session: Session, examples: int, now: Callable[[], float]) -> dict[str, Any]:
    """Losses and answers of a system in one go, against losses and then answers, and against losses alone."""
    test, settings = session.splits.test[:examples], session.recipe.generation
    prompts, gold = [one.prompt_ids for one in test], [one.completion_ids for one in test]
    model, tokenizer = session.backbone.model, session.backbone.tokenizer
    probes = ProbeSet(test, session.pad_id)

    def in_one_go() -> list[str]:
        reader = Reader(model, tokenizer, prompts, gold, settings)
        probes.losses(model, reader=reader)
        return reader.answers()

    def one_after_the_other() -> list[str]:
        probes.losses(model)
        return generate(model, tokenizer, prompts, settings)

    found: dict[str, list[str]] = {}
    works = {
        "in_one_go": lambda: found.__setitem__("new", in_one_go()),
        "one_after_the_other": lambda: found.__setitem__("old", one_after_the_other()),
        "losses_alone": lambda: probes.losses(model),
    }
    with timed(model, now) as clock:
        costs = {name: run(clock, work) for name, work in works.items()}
    whole = costs["losses_alone"]
    return {
        "different_answers": sum(a != b for a, b in zip(found["new"], found["old"], strict=True)),
        "exact": sum(a in one.references for a, one in zip(found["new"], test, strict=True)),
        "over_losses_alone": {
            name: {
                "seconds": round(cost.total / whole.total, 2),
                "tokens": round(cost.tokens / whole.tokens, 2),
                "passes": round(cost.passes / whole.passes, 1),
            }
            for name, cost in costs.items()
        },
    }


@contextmanager
def rows_that_stay() -> Iterator[None]:
    """Let every row stay in its batch until the last one has ended."""
    usual = generation._TOKENS_BETWEEN
    generation._TOKENS_BETWEEN = 10**9
    try:
        yield
    finally:
        generation._TOKENS_BETWEEN = usual


def wall_time() -> float:
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Clock:
    """Reads the time; seconds spent on generation and on parts of it."""

    now: Callable[[], float]
    total: float = 0.0
    head: float = 0.0
    prefill: float = 0.0
    passes: int = 0
    tokens: int = 0


@contextmanager
def timed(model: Any, now: Callable[[], float]) -> Iterator[Clock]:
    """Time the head and the forward passes over whole prompts."""
    clock = Clock(now)
    started: dict[str, float] = {}

    def start(name: str) -> Callable[..., None]:
        return lambda *_: started.__setitem__(name, now())

    def end_head(*_: Any) -> None:
        clock.head += now() - started["head"]

    def end_model(_: Any, inputs: Any, named: dict[str, Any], output: Any) -> None:
        clock.passes += 1
        clock.tokens += named["input_ids"].numel()
        if named["input_ids"].shape[1] > 1:
            clock.prefill += now() - started["model"]

    head = model.get_output_embeddings()
    hooks = [
        head.register_forward_pre_hook(start("head")),
        head.register_forward_hook(end_head),
        model.register_forward_pre_hook(start("model")),
        model.register_forward_hook(end_model, with_kwargs=True),
    ]
    try:
        yield clock
    finally:
        for hook in hooks:
            hook.remove()


def run(clock: Clock, work: Callable[[], object]) -> Clock:
    """Do the work once and return what the clock showed for it."""
    before = replace(clock)
    started = clock.now()
    work()
    return Clock(
        clock.now,
        clock.now() - started,
        clock.head - before.head,
        clock.prefill - before.prefill,
        clock.passes - before.passes,
        clock.tokens - before.tokens,
    )


def training_step(session: Session, examples: int, now: Callable[[], float]) -> float:
    """Return seconds per example of one epoch of the final run's fine-tune."""
    train = session.splits.train[:examples]
    settings = replace(session.recipe.final.training, epochs=1, patience=None, keep="last")
    with (
        fresh_adapter(session.backbone.model, session.recipe.lora, seed=0) as model,
        tempfile.TemporaryDirectory() as folder,
    ):
        started = now()
        finetune(model, train, (), settings, pad_id=session.pad_id, seed=0, folder=Path(folder))
        return (now() - started) / len(train)


if __name__ == "__main__":
    main()

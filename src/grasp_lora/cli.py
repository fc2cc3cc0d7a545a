"""The command line: parse, call, print. A user's mistake is one line and exit status 2."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from grasp_lora.display import escaped, one_line

if TYPE_CHECKING:
    from grasp_lora.experiments.session import Session

app = typer.Typer(
    name="grasp-lora",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Adapt a language model to a language with little data: merge a source and a target LoRA adapter and
[bold]learn how much of the merge to prune[/bold] in one training run (GRASP LoRA, arXiv 2601.06702).

Start with [bold]grasp-lora demo[/bold], then [bold]grasp-lora init my-data.csv[/bold] for your own examples.""",
)
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run it again
console = Console()
error_console = Console(stderr=True)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a built-in one (see `recipes`).")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Change one value: a.b=value, for example data.root=/data. May be repeated."),
]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run; default runs/NAME.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show what happens in detail.")]
AdapterFolder = Annotated[str, typer.Option("--adapter", "-a", help="PEFT adapter: a folder or a hub id.")]
StepOutput = Annotated[Path, typer.Option("--output", "-o", help="Folder for the result.")]


@app.command()
def run(
    recipe: RecipeArgument, overrides: SetOption = None, output: OutputOption = None, verbose: VerboseOption = False
) -> None:
    """Do the whole job: adapters, merge, learn the ratio, final run, evaluation, report.

    Run it again on the same folder to go on after an interruption: completed stages are skipped.
    """
    _log(verbose)
    _run(recipe, overrides or [], output)


@app.command()
def demo(
    language: Annotated[str, typer.Option(help="Target language of the demo: ar or zh.")] = "ar",
    overrides: SetOption = None,
    output: OutputOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Run the main job on an embedded model and embedded texts; minutes on a laptop."""
    from grasp_lora.errors import RecipeError

    _log(verbose)
    if language not in ("ar", "zh"):
        raise RecipeError(f"demo language is {language!r}; allowed: ar, zh")
    _run(f"demo-{language}", overrides or [], output)


@app.command()
def check(recipe: RecipeArgument, overrides: SetOption = None, verbose: VerboseOption = False) -> None:
    """Check a recipe before running it: files, adapters, label masks, lengths, splits, leaks, rounds and cost."""
    _log(verbose)
    from grasp_lora.experiments.preflight import preflight

    for finding in preflight(_session(recipe, overrides)):
        mark = "[green]ok     [/green]" if finding.level == "ok" else "[yellow]warning[/yellow]"
        console.print(f"{mark} [bold]{finding.topic:<10}[/bold]", end=" ")
        _say(finding.text)


@app.command()
def recipes() -> None:
    """List the built-in recipes."""
    from grasp_lora.experiments.recipe import builtin_recipes

    for name in builtin_recipes():
        console.print(name, highlight=False)


@app.command()
def init(
    data: Annotated[
        Path,
        typer.Argument(
            help="Your examples, at least about 40: CSV, TSV, JSON, JSONL or parquet with columns prompt and completion, "
            "messages, context, question and answer, or document and summary; or SQuAD JSON."
        ),
    ],
    language: Annotated[str, typer.Option("--language", "-l", help="Language of the examples, such as ar, zh or sw.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The recipe file; default NAME.yaml here.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            help="Data file of the rich language, or a PEFT adapter folder or hub id trained on it. May be repeated.",
        ),
    ] = None,
    source_language: Annotated[str, typer.Option(help="Language of the source data.")] = "en",
    backbone: Annotated[str, typer.Option(help="Backbone: a hub id, a folder, or gemma3-270m.")] = "gemma3-270m",
) -> None:
    """Write a commented recipe, with split sizes that fit your own examples."""
    from grasp_lora.experiments.starter import write_recipe

    file = write_recipe(data, language, output, source or [], source_language, backbone)
    name_source = "" if source else "name a source in it, then "
    _say(f"wrote {file}; next: {name_source}grasp-lora check {file}")


@app.command()
def predict(
    adapter: Annotated[str, typer.Argument(help="PEFT adapter: a folder or a hub id.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; without any, one a line from standard input.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Backbone; default: the one that the adapter names.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Answer prompts with an adapter, one answer a line."""
    from grasp_lora.experiments.steps import predict_texts

    _log(False)
    texts = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    for answer in predict_texts(adapter, texts, backbone, max_new_tokens, device):
        sys.stdout.write((escaped(answer) if sys.stdout.isatty() else answer) + "\n")


@app.command()
def merge(
    adapters: Annotated[list[str], typer.Argument(help="PEFT adapters to merge: folders or hub ids.")],
    output: StepOutput,
    backbone: Annotated[
        str | None, typer.Option(help="Backbone; default: the one that the first adapter names.")
    ] = None,
    rule: Annotated[
        str,
        typer.Option(
            help="exact, svd, paper_sum, paper_sum_unscaled, lorahub, ties, ties_svd, dare, dare_svd or dare_ties."
        ),
    ] = "exact",
    weight: Annotated[
        list[float] | None,
        typer.Option(help="Weight of an adapter, once per adapter in order; default: the rule's own."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the result, for rules that end in an SVD.")] = None,
    density: Annotated[float, typer.Option(help="Share of weights that TIES and DARE keep.")] = 0.5,
) -> None:
    """Merge LoRA adapters into one ordinary PEFT adapter."""
    from grasp_lora.experiments.steps import merge_folders

    _log(False)
    facts = merge_folders(adapters, output, backbone, rule, weight, rank, density)
    _say(facts)


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(help="PEFT adapter: a folder or a hub id.")],
    output: StepOutput,
    rank: Annotated[int | None, typer.Option(help="Best approximation of this rank; the error is printed.")] = None,
    prune_rank: Annotated[
        bool, typer.Option("--prune-rank", help="Drop the rank-one components that the mask has emptied.")
    ] = False,
    uniform_rank: Annotated[
        bool, typer.Option("--uniform-rank", help="Pad all modules with zeros to one rank, as llama.cpp needs it.")
    ] = False,
    fold: Annotated[bool, typer.Option("--fold", help="Add it to the backbone and write the whole model.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default float32, with --fold none.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Backbone; default: the one that the adapter names.")] = None,
) -> None:
    """Make an adapter ready for others: smaller, in another dtype, or folded into its backbone.

    Prints the error that this costs, and what vLLM and llama.cpp need to take the result.
    """
    from grasp_lora.experiments.export import ExportSettings, export_folder

    _log(False)
    settings = ExportSettings(rank, prune_rank, uniform_rank, fold, dtype)
    for line in export_folder(adapter, output, settings, backbone):
        _say(line)
    _say(f"-> {output}")


@app.command()
def learn(
    recipe: RecipeArgument,
    adapter: AdapterFolder,
    output: StepOutput,
    overrides: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Learn the prune ratio of a merged adapter (the controller run alone)."""
    from grasp_lora.experiments.steps import learn_folder

    _log(verbose)
    estimate = learn_folder(_session(recipe, overrides), adapter, output)
    _say(
        f"prune ratio {estimate.ratio:.4f} (95 % interval {estimate.low:.4f} to {estimate.high:.4f}, "
        f"{estimate.rounds} rounds) -> {output}"
    )


@app.command()
def finetune(
    recipe: RecipeArgument,
    adapter: AdapterFolder,
    ratio: Annotated[float, typer.Option(help="Prune ratio, a fraction in [0, 1].")],
    output: StepOutput,
    overrides: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Prune a merged adapter at a given ratio and fine-tune it (the final run alone)."""
    from grasp_lora.experiments.steps import finetune_folder

    _log(verbose)
    result = finetune_folder(_session(recipe, overrides), adapter, ratio, output)
    loss = "" if result.dev_loss is None else f", dev loss {result.dev_loss:.4f}"
    _say(f"{result.steps} steps, best at step {result.best_step}{loss} -> {output}")


@app.command()
def evaluate(
    recipe: RecipeArgument,
    adapter: Annotated[list[str], typer.Option("--adapter", "-a", help="PEFT adapter; may be repeated.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for predictions and metrics.")] = None,
    overrides: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Measure adapters on the recipe's dev and test splits."""
    from grasp_lora.experiments.steps import evaluate_folders

    _log(verbose)
    _print_table(evaluate_folders(_session(recipe, overrides), adapter, output))


@app.command()
def compare(
    recipe: RecipeArgument,
    methods: Annotated[
        str | None,
        typer.Option(help="Methods, separated by commas; default: all that are named above but the last two."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "42,1337,9001",
    grid: Annotated[
        str, typer.Option(help="Prune ratios of the grid search, fractions in [0, 1].")
    ] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8",
    reference: Annotated[str, typer.Option(help="The method that the others are compared with.")] = "grasp",
    split_seed: Annotated[
        list[int] | None,
        typer.Option(help="Do all of it once more, with the first seed, on the split of this seed. May be repeated."),
    ] = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Run every baseline and GRASP under one protocol; print the table with uncertainty and cost.

    Run it again to go on after an interruption, or on another machine with a copy of the folder's records: what is on record is
    not done again. Methods: zero_shot, source_only, target_only, target_wide (rank of the merge), target_long (steps of GRASP),
    continued (source adapter on the target data), joint, ties, dare_ties, lorahub, merged, adaptive_merge, grid_paper (the
    paper's baseline), grid (of the recipe's own final runs), grid_16 (16 examples choose), grasp, grasp_paper, grasp_random,
    grasp_50 (probes the dev set), one_shot, merge_dev_free, grid_dev_free, grasp_dev_free; grasp_default, and
    grid_oracle, which is not fair.
    """
    from grasp_lora.errors import GraspError, RecipeError
    from grasp_lora.experiments.recipe import load_recipe

    _log(verbose)
    loaded, base = load_recipe(recipe, overrides or [])
    folder = output or Path("runs") / f"{loaded.name}-compare"
    with console.status("loading", spinner="dots") if console.is_terminal else _nothing():
        from grasp_lora.experiments.baselines import DEFAULT_METHODS
        from grasp_lora.experiments.comparison import ComparisonSettings
        from grasp_lora.experiments.comparison import compare as run_comparison
        from grasp_lora.experiments.comparison_report import print_comparison
        from grasp_lora.experiments.progress import TerminalComparisonProgress
        from grasp_lora.experiments.session import Session
    try:
        settings = ComparisonSettings(
            DEFAULT_METHODS if methods is None else tuple(_parts(methods)),
            tuple(_number(int, "--seeds", seed) for seed in _parts(seeds)),
            tuple(_number(float, "--grid", ratio) for ratio in _parts(grid)),
            reference,
            tuple(split_seed or ()),
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
    progress = TerminalComparisonProgress(console)
    try:
        content = run_comparison(Session(loaded, base), folder, settings, progress)
    finally:
        progress.stop()
    print_comparison(content, console)
    _say(f"tables {folder / 'compare.md'}   report {folder / 'report.html'}")
    failed = [f"{row['title']} {row['unavailable']}" for row in content["rows"] if row["failed"]]
    if failed:
        raise GraspError(f"{len(failed)} of {len(content['rows'])} methods failed: {'; '.join(failed)}")


@app.command()
def sweep(
    recipe: RecipeArgument,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            "-p",
            help=r"What to vary: KEY=low..high, KEY=low..high:log, KEY=low..high/n for n values, KEY=\[a, b]. May be repeated.",
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="How many trials in all; default 20, with the grid sampler all combinations.")
    ] = None,
    sampler: Annotated[str, typer.Option(help="tpe, random or grid.")] = "tpe",
    pruner: Annotated[str, typer.Option(help="Stop bad trials early: none, median, halving or wilcoxon.")] = "none",
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler; default: the recipe's.")] = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Search good values for any keys of a recipe with Optuna, by the dev loss of the final run.

    For example --param final.prune_ratio=0.1..0.8, the search that the learned ratio replaces. Writes best.yaml for `run`. Run it
    again to go on after an interruption.
    """
    _log(verbose)
    options = {"trials": trials, "sampler": sampler, "pruner": pruner, "seed": seed}
    _sweep(recipe, overrides or [], output, {"params": tuple(param or ()), **options})


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html and report.md of a run folder again."""
    from grasp_lora.experiments.report import write_report

    _say(f"wrote {write_report(folder)}")


def main() -> None:
    """Run the command line; a GraspError becomes one line and exit status 2, a stop by a signal one line and 75."""
    from grasp_lora.errors import GraspError, Interrupted

    _quiet_libraries()
    try:
        app(prog_name="grasp-lora")
    except Interrupted as stop:
        error_console.print(one_line(str(stop)), style="yellow", markup=False, highlight=False, soft_wrap=True)
        sys.exit(STOPPED)
    except GraspError as error:
        # What a library or a file put into the message may hold line breaks, or worse.
        error_console.print(
            f"error: {one_line(str(error))}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(2)


def _session(recipe: str, overrides: list[str] | None) -> "Session":
    from grasp_lora.experiments.recipe import load_recipe
    from grasp_lora.experiments.session import Session

    loaded, base = load_recipe(recipe, overrides or [])
    return Session(loaded, base)


def _run(recipe: str, overrides: list[str], output: Path | None) -> None:
    from grasp_lora.experiments.recipe import load_recipe

    loaded, base = load_recipe(recipe, overrides)
    folder = output or Path("runs") / loaded.name
    with console.status("loading", spinner="dots") if console.is_terminal else _nothing():
        from grasp_lora.experiments.pipeline import Run
        from grasp_lora.experiments.progress import TerminalProgress
        from grasp_lora.method.estimation import WIDE_INTERVAL
    progress = TerminalProgress(console)
    try:
        metrics = Run(loaded, base, folder, progress).execute()
    finally:
        progress.stop()
    _print_table(metrics)
    ratio, interval = metrics["prune_ratio"], metrics["prune_ratio_interval"]
    learned = f" (95 % interval {interval[0]:.1%} to {interval[1]:.1%})" if interval else " (given)"
    console.print(f"prune ratio {ratio:.1%}{learned}", highlight=False)
    if interval and interval[1] - interval[0] >= WIDE_INTERVAL:
        console.print(
            "[yellow]the interval is wide: these probes do not settle the ratio; the report says what narrows it[/yellow]",
            soft_wrap=True,
        )
    _say(f"adapter {folder / 'adapter'}   report {folder / 'report.html'}")


def _sweep(recipe: str, overrides: list[str], output: Path | None, options: dict[str, Any]) -> None:
    from grasp_lora.errors import RecipeError
    from grasp_lora.experiments.recipe import load_recipe

    loaded, base = load_recipe(recipe, overrides)
    folder = output or Path("runs") / f"{loaded.name}-sweep"
    with console.status("loading", spinner="dots") if console.is_terminal else _nothing():
        from grasp_lora.experiments.progress import TerminalSweepProgress, print_sweep
        from grasp_lora.experiments.session import Session
        from grasp_lora.experiments.sweep import BEST_FILE, SweepSettings, sweep
    try:
        settings = SweepSettings(**options)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    progress = TerminalSweepProgress(console)
    try:
        content = sweep(Session(loaded, base), folder, settings, progress)
    finally:
        progress.stop()
    print_sweep(content, console)
    _say(f"best recipe {folder / BEST_FILE}")


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(kind: type[int] | type[float], option: str, text: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{option} holds {text!r}; give numbers, separated by commas") from error


def _print_table(metrics: dict[str, Any]) -> None:
    names = list(metrics["signatures"])
    table = Table("system", "dev loss", "test loss", *names)
    for system, row in metrics["systems"].items():
        losses = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("dev_loss", "test_loss")]
        scores = [row["metrics"].get(name) for name in names]
        table.add_row(
            one_line(system), *losses, *("unavailable" if value is None else f"{value:.1f}" for value in scores)
        )
    console.print(table)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _quiet_libraries() -> None:
    """Ask the libraries for errors only; they read this when they are imported, so it comes before all of them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not error_console.is_terminal:  # in a terminal a download of gigabytes should show that it moves
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")  # the conversion of GGUF weights heeds only this


class _OneLine(logging.Formatter):
    """What a file or a model put into a message must not reach the terminal as control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def _say(text: str) -> None:
    """Print one line as it is."""
    console.print(one_line(text), markup=False, highlight=False, soft_wrap=True)


def _log(verbose: bool) -> None:
    """Show warnings of ours, and with --verbose what happens."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(levelname)s: %(message)s"))
    ours = logging.getLogger("grasp_lora")
    ours.handlers[:] = [handler]
    ours.setLevel(logging.INFO if verbose else logging.WARNING)
    ours.propagate = False

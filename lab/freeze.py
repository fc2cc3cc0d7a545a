"""What must not change while code moves: hashes of all that tiny runs leave, by the command line alone.

Write them before a change and compare them after it, on the same machine, since other processors round otherwise:

    python lab/freeze.py write
    python lab/freeze.py check

All presets, all masks and all merge rules but `paper_apart` are run; a comparison,
exports and resumed runs, too. A hash stands for the tensors of an adapter, the rounds of a controller, the losses and
scores of a table, or the answers.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

ROUND = (
    "step", "candidates", "baseline_losses", "candidate_losses", "places", "rewards", "policy_mean", "policy_std",
    "committed", "clipped", "ratio_before", "ratio", "measured_sparsity",
)  # fmt: skip
GRASP = "controller={preset: grasp, rounds: {every: 3}, training: {epochs: 1, learning_rate: 1.0e-2}}"
RUNS: dict[str, tuple[str, ...]] = {
    "grasp": (GRASP, "controller.training.epochs=3"),
    "grasp_rounds": ("controller={preset: grasp, rounds: {every: 2}, training: {epochs: 1, learning_rate: 3.0e-3}}",),
    "grasp_without_dev": (GRASP, "controller.training.epochs=2", "data.target.dev=0", "final.training.patience=null"),
    "paper": (
        "controller.rule=best_reward",
        "controller.rounds.every=2",
        "final.mode=reselect",
        "merge={rule: paper_sum_unscaled, weights: [1.0, 1.0]}",
    ),
    "input_aware": ("controller.rule=best_reward", "mask={score: input_aware}"),
    "component": (GRASP, "merge={rule: svd, rank: 3}"),
    "given": ("final.prune_ratio=0.45", "merge.rule=dare_ties", "final.training.epochs=2"),
    "best": (GRASP, "final.deliver=best"),
    "on_source": (GRASP, "target.on=source", "final.deliver=best"),
    "no_dev": ("data.target.dev=0", "final.training.patience=null", "merge.rule=paper_sum"),
}
# The optimizer step after which a signal comes.
INTERRUPTED = {"grasp": 22, "paper": 31, "given": 17}
METHODS = (
    "zero_shot,source_only,target_only,continued,joint,ties,dare_ties,lorahub,merged,adaptive_merge,grid_paper,grid,grasp,"
    "grasp_paper"
)
EXPORTS = {"folded": ("--fold", "--dtype", "float32")}


def main() -> None:
    """Write the hashes, or say which differ from those that were written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("write", "check"))
    parser.add_argument("file", type=Path, nargs="?", default=Path(__file__).with_name("frozen.json"))
    parser.add_argument("--only", help="cases whose name begins with this")
    given = parser.parse_args()
    file, found = given.file.absolute(), {}
    for case, hashes in cases(given.only or ""):
        found[case] = hashes
        sys.stderr.write(f"{case}: {len(hashes)} hashes\n")
    before = json.loads(file.read_text(encoding="utf-8")) if given.only or given.action == "check" else {}
    if given.action == "write":  # with --only the other cases stay as they are
        file.write_text(json.dumps(before | found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return
    before = {case: hashes for case, hashes in before.items() if case.startswith(given.only or "")}
    differing = sorted(
        f"{case} {name}"
        for case in {*before, *found}
        for name in {*before.get(case, {}), *found.get(case, {})}
        if before.get(case, {}).get(name) != found.get(case, {}).get(name)
    )
    sys.stdout.write("".join(f"differs: {one}\n" for one in differing) + f"{len(differing)} differ\n")
    sys.exit(bool(differing))


def cases(only: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each case with the hashes of what it left, in a folder of its own."""
    from grasp_lora.storage import checkpoints

    checkpoints.LEAST_STEPS = 3  # tiny trainings are over before the usual distance
    from conftest import build_tiny_model, build_tiny_tokenizer, write_tiny_workspace

    with tempfile.TemporaryDirectory() as scratch:
        backbone, work = Path(scratch) / "tiny-llama", Path(scratch) / "work"
        build_tiny_model("llama").save_pretrained(backbone)
        build_tiny_tokenizer().save_pretrained(backbone)
        write_tiny_workspace(work, backbone)
        os.chdir(work)
        for name, overrides in RUNS.items():
            if f"run {name}".startswith(only):
                call("run", "tiny.yaml", "--output", name, *sets(overrides))
                yield f"run {name}", of_run(Path(name))
        for name, step in INTERRUPTED.items():
            if f"resume {name}".startswith(only):
                folder = f"{name}-resumed"
                arguments = ("run", "tiny.yaml", "--output", folder, *sets(RUNS[name]))
                with signal_after(step):
                    call(*arguments, expected=75)
                call(*arguments)
                yield f"resume {name}", of_run(Path(folder))
        if "compare".startswith(only):
            more = ("--methods", METHODS, "--seeds", "42,7", "--grid", "0.2,0.5", "--output", "compared")
            call("compare", "tiny.yaml", *more)
            yield "compare", of_comparison(Path("compared"))
        for name, arguments in EXPORTS.items():
            if f"export {name}".startswith(only):
                if not Path("grasp").is_dir():
                    call("run", "tiny.yaml", "--output", "grasp", *sets(RUNS["grasp"]))
                call("export", "grasp/adapter", "--output", f"export-{name}", *arguments)
                yield (
                    f"export {name}",
                    {file.name: of_tensors(file) for file in Path(f"export-{name}").glob("*.safetensors")},
                )


def call(*arguments: str, expected: int = 0) -> None:
    """Call the command line in this process.

    Raises:
        RuntimeError: it ends with another status than expected.
    """
    from grasp_lora.cli import main as command

    sys.argv = ["grasp-lora", *arguments]
    status, errors = 0, io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            command()
    except SystemExit as end:
        status = int(end.code or 0)
    if status != expected:
        raise RuntimeError(f"{' '.join(arguments)} ended with status {status}: {errors.getvalue()[-500:]}")


def sets(overrides: Sequence[str]) -> list[str]:
    """Overrides as the command line takes them."""
    return [text for override in overrides for text in ("--set", override)]


@contextlib.contextmanager
def signal_after(step: int) -> Iterator[None]:
    """Send SIGTERM to this process after so many optimizer steps, those of all trainings counted."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    taken = 0

    def count(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), signal.SIGTERM)

    handle = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        handle.remove()


def of_run(folder: Path) -> dict[str, str]:
    """The hashes of a run folder."""
    metrics = read(folder / "metrics.json")
    found = {"metrics": of_value([metrics["systems"], metrics["prune_ratio"], metrics["prune_ratio_interval"]])}
    more = ("continued", "final") if (folder / "continued").is_dir() else ()
    for name in ("source", "target", "merged", "adapter", *more):
        file = folder / name / "adapter_model.safetensors"
        if name != "target" or file.is_file():  # with target.on there is none
            found[name] = of_tensors(file)
    for file in sorted((folder / "evaluation").glob("*.jsonl")):
        found[f"answers {file.stem}"] = of_value(rows(file))
    for stage in ("source", "target", "controller", "final"):
        if (file := folder / stage / "history.jsonl").is_file():
            found[f"history {stage}"] = of_value(rows(file))
    if (file := folder / "controller" / "rounds.jsonl").is_file():
        found["rounds"] = of_value([{key: row.get(key) for key in ROUND} for row in rows(file)])
        ratio = read(folder / "controller" / "ratio.json")
        found["ratio"] = of_value({key: ratio[key] for key in ("ratio", "low", "high", "curve", "rounds")})
    found["sparsity"] = of_value(read(folder / "final" / "sparsity.json"))
    return found


def of_comparison(folder: Path) -> dict[str, str]:
    """The hashes of a comparison, one a row."""
    [file] = folder.rglob("compare.json")
    content = read(file)
    found = {"curve": of_value(content["curve"])}
    for row in content["rows"]:
        row = dict(row)
        facts = {key: row.get(key) for key in ("unavailable", "scores", "prune_ratio", "against")}
        facts["cost"] = (
            {key: value for key, value in row["cost"].items() if "seconds" not in key} if "cost" in row else None
        )
        found[row["method"]] = of_value(facts)
    return found


def of_tensors(file: Path) -> str:
    """Hash of names, shapes and bytes of a safetensors file's tensors."""
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype), tensor.double().flatten().tolist())).encode())
    return digest.hexdigest()[:16]


def of_value(value: Any) -> str:
    """Hash of plain values, every digit of them."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def rows(file: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


if __name__ == "__main__":
    main()

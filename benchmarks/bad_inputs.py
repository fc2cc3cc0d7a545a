"""Whether bad input to the real command line ends in one line: hundreds of cases, each in a process of its own.

    OMP_NUM_THREADS=1 python benchmarks/bad_inputs.py

A case passes if the command ends with status 2 and one line that begins with `error:`, within 20 seconds, and leaves the working
folder as it was. What else happens is printed: a stack trace, another status, two lines, a file left over, or input that was
taken. Needs a system with fork; the model is the random two-layer one of the tests.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "bench")]

from conftest import build_tiny_model, build_tiny_tokenizer, write_tiny_workspace  # noqa: E402
from killed_runs import attempt, call, load_everything  # noqa: E402

from grasp_lora.recipes.builtin import recipe_keys  # noqa: E402

LONGEST = 20  # seconds for one case
GIVEN = "given"  # the folder of a finished run
ROW = '{"prompt": "p %d", "completion": " c"}\n'
GOOD = "".join(ROW % number for number in range(60))


@dataclass(frozen=True)
class Case:
    """A command, and the files that it finds beside the workspace's.

    Args:
        kind: what is wrong, for the table.
        arguments: of the command line.
        files: name -> content.
        note: what is wrong with the files, for the list.
        link, pipe: name of what is no plain file: a link to itself, a named pipe.
    """

    kind: str
    arguments: tuple[str, ...]
    files: tuple[tuple[str, bytes], ...] = ()
    note: str = ""
    link: str = ""
    pipe: str = ""


def main() -> None:
    """Run all cases, and write one JSON object to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the kind of the cases to run")
    only = parser.parse_args().only
    load_everything()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        backbone = Path(folder) / "tiny-llama"
        build_tiny_model("llama").save_pretrained(backbone)
        build_tiny_tokenizer().save_pretrained(backbone)
        workspace = write_tiny_workspace(Path(folder) / "work", backbone).parent
        given = attempt(workspace, ["run", "tiny.yaml", "--output", GIVEN], workspace / GIVEN)
        if given.status:
            raise RuntimeError(given.error)
        shutil.rmtree(workspace / GIVEN / "store")
        recipe = (workspace / "tiny.yaml").read_text(encoding="utf-8")
        config = json.loads((workspace / GIVEN / "merged" / "adapter_config.json").read_text(encoding="utf-8"))
        weights = (workspace / GIVEN / "merged" / "adapter_model.safetensors").read_bytes()
        cases = [one for one in every_case(recipe, config, weights) if only in one.kind]
        failed = [problem for case in cases if (problem := problem_of(case, workspace))]
    kinds = Counter(case.kind for case in cases)
    found = {"cases": len(cases), "kinds": kinds, "failed": failed, "seconds": round(time.perf_counter() - started)}
    sys.stdout.write(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def every_case(recipe: str, config: dict[str, object], weights: bytes) -> Iterator[Case]:
    """All cases, by kind."""
    for key in recipe_keys():
        for value in ("{nonsense: [1]}", "-7.5", "[[]]"):
            yield Case("value of a key", ("check", "tiny.yaml", "--set", f"{key}={value}"))
        yield Case("key", ("check", "tiny.yaml", "--set", f"{key}x=1"))
    yield from _recipes(recipe)
    yield from _data()
    yield from _adapters(config, weights)
    yield from _arguments()


def _recipes(recipe: str) -> Iterator[Case]:
    spoiled = {
        "empty": b"",
        "nul": b"\0" * 100,
        "list": b"- a\n",
        "latin": "name: caf\xe9".encode("latin-1"),
        "text": b"name",
        "utf16": recipe.encode("utf-16"),
        "twice": recipe.encode() + b"name: b\n",
        "tag": b"name: !!python/name:os.system x\n",
        "alias": b"name: &a b\ndata: *a\n",
        "merge key": b"<<: {name: a}\n",
        "deep": b"a: " + b"[" * 500 + b"]" * 500,
        "large": b"#" * 2_000_000,
        "octal": recipe.encode() + b"seed: 0010\n",
        "base 60": recipe.encode() + b"seed: 1:30\n",
        "no date": recipe.encode() + b"report_to: [2026-13-45]\n",
        "infinite": recipe.encode() + b"save_every: .inf\n",
        "nan": recipe.replace("rank: 2", "rank: .nan").encode(),
        "huge": recipe.encode() + b"seed: " + b"9" * 5000 + b"\n",
        "tab": b"name:\ta\n\tdata: x\n",
        "two documents": recipe.encode() + b"---\nname: b\n",
        "key a list": b"? [a]\n: b\n",
        "null": b"name: null\ndata: null\n",
        "controls": b'name: "a\\u0007b"\n',
        "path as name": b"name: ../../etc\n",
        "no end": recipe.encode() + b"metrics: [f1\n",
        "bom in the middle": recipe.replace("name", "\ufeffname").encode(),
    }
    for name, content in spoiled.items():
        for command in ("check", "run"):
            yield Case("recipe", (command, f"{name}.yaml"), ((f"{name}.yaml", content),))
    yield Case("recipe", ("run", "loop.yaml"), link="loop.yaml")
    yield Case("recipe", ("run", "pipe.yaml"), pipe="pipe.yaml")
    for place in (
        ".",
        "/dev/zero",
        "/dev/null",
        "none.yaml",
        "a" * 300,
        "\x1b[31m",
        "http://localhost/x",
    ):
        yield Case("recipe", ("check", place))
        yield Case("recipe", ("compare", place))


def _data() -> Iterator[Case]:
    spoiled = {
        "empty.jsonl": b"",
        "nul.jsonl": b"\0" * 500,
        "half.jsonl": GOOD.encode()[:-9],
        "latin.csv": "a,b\n\xe9,\xe9\n".encode("latin-1"),
        "array.jsonl": b"[1, 2]\n" * 60,
        "numbers.jsonl": b"1\n" * 60,
        "nested.jsonl": b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}\n",
        "digits.jsonl": b'{"prompt": ' + b"9" * 5000 + b', "completion": "c"}\n',
        "surrogate.jsonl": b'{"prompt": "\\ud800", "completion": "c"}\n' * 60,
        "object.json": b"{}",
        "text.json": b'"text"',
        "null.json": b"null",
        "nan.json": b"NaN",
        "bare.csv": b"prompt,completion\n",
        "one.csv": b"prompt;completion\na;b\n" * 40,
        "ragged.csv": b"prompt,completion\na,b,c,d\n" * 60,
        "quote.csv": b'prompt,completion\n"a,b\n' * 60,
        "twice.csv": b"prompt,prompt,completion\na,b,c\n" * 60,
        "no.parquet": b"PAR1" + b"\0" * 50 + b"PAR1",
        "cut.parquet": b"PAR1",
        "squad.json": b'{"data": [{"paragraphs": 3}]}',
        "squad2.json": b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": 1}]}]}]}',
        "empty answers.jsonl": b'{"prompt": "p", "completion": ""}\n' * 60,
        "same.jsonl": b'{"prompt": "p", "completion": "c"}\n' * 60,
        "columns.jsonl": b'{"x": "p", "y": "c"}\n' * 60,
        "mixed.jsonl": (GOOD + '{"x": 1}\n').encode(),
        "few.jsonl": GOOD.encode()[:300],
        "chat.jsonl": b'{"messages": [{"role": "system", "content": "a"}]}\n' * 60,
        "role.jsonl": b'{"messages": [{"role": 1, "content": []}]}\n' * 60,
        "number.jsonl": b'{"prompt": "p", "completion": {"a": 1}}\n' * 60,
        "suffix.docx": b"PK\3\4" + b"\0" * 50,
        "gz.jsonl.gz": b"\x1f\x8b" + b"\0" * 50,
        "bool.jsonl": b'{"prompt": "p", "completion": true}\n' * 60,
        "utf16.jsonl": GOOD.encode("utf-16-be"),
        "spaces.tsv": b" \t \n" * 60,
    }
    for name, content in spoiled.items():
        yield Case("data", ("init", name, "--language", "de", "--output", "new.yaml"), ((name, content),))
        changes = (f"data.target.files=['{name}']", "data.target.language=de")
        yield Case(
            "data", ("check", "tiny.yaml", *(text for one in changes for text in ("--set", one))), ((name, content),)
        )
    for place in (".", "/dev/zero", "none.jsonl", "b" * 300 + ".csv", "given", "demo:none.json", "demo:../../x"):
        yield Case("data", ("init", place, "--language", "de", "--output", "new.yaml"))
        yield Case("data", ("check", "tiny.yaml", "--set", f"data.target.files=['{place}']"))
    for language in ("", "-1", "de_DE@x", "\u202e", "l" * 2000):
        yield Case("data", ("init", "target.jsonl", f"--language={language}", "--output", "new.yaml"))


def _adapters(config: dict[str, object], weights: bytes) -> Iterator[Case]:
    kept = (("bad/adapter_model.safetensors", weights),)
    ranks: tuple[object, ...] = (0, -1, 10**12, "2", None, [2], 3, 2.5)
    changes: list[dict[str, object]] = [
        *({"r": rank} for rank in ranks),
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**400},
        {"lora_alpha": "x"},
        {"peft_type": "IA3"},
        {"peft_type": 3},
        {"target_modules": 7},
        {"use_dora": True},
        {"bias": "all"},
        {"rank_pattern": {"q_proj": -1}},
        {"rank_pattern": {"(": 2}},
        {"alpha_pattern": 3},
        {"modules_to_save": ["lm_head"]},
        {"base_model_name_or_path": ["a"]},
        {"base_model_name_or_path": "no/such/place"},
        {"base_model_name_or_path": "bad"},
    ]
    for change in changes:
        content = json.dumps(config | change).encode()
        commands = [("export", "bad", "--rank", "1"), ("merge", "bad", f"{GIVEN}/source")]
        if "base_model_name_or_path" not in change:  # which evaluate does not need: the recipe names the backbone
            commands.append(("evaluate", "tiny.yaml", "-a", "bad"))
        for command in commands:
            yield Case(
                "adapter",
                (*command, "--output", "out"),
                (("bad/adapter_config.json", content), *kept),
                f"{change}"[:80],
            )
    whole = json.dumps(config).encode()
    header = int.from_bytes(weights[:8], "little")
    spoiled = {
        "empty": b"",
        "short": weights[:20],
        "cut": weights[:-5],
        "longer": weights + b"x",
        "header": b"\xff" * 8 + weights[8:],
        "json": weights[:8] + b"x" * header + weights[8 + header :],
        "nan": weights[: 8 + header] + b"\xff" * (len(weights) - 8 - header),
        "pickle": b"\x80\x04K\x01.",
        "zip": b"PK\3\4" + weights,
    }
    for content in spoiled.values():
        files = (("bad/adapter_config.json", whole), ("bad/adapter_model.safetensors", content))
        yield Case("adapter", ("export", "bad", "--rank", "1", "--output", "out"), files)
        yield Case("adapter", ("predict", "bad", "hello"), files)
        yield Case("adapter", ("finetune", "tiny.yaml", "-a", "bad", "--ratio", "0.5", "--output", "out"), files)
    for content in (b"", b"[]", b"{", b"null", b"\xff\xfe", whole[:-9], b"[" * 9000):
        files = (("bad/adapter_config.json", content), *kept)
        yield Case("adapter", ("learn", "tiny.yaml", "-a", "bad", "--output", "out"), files)
        yield Case("adapter", ("predict", "bad", "hello"), files)
    for place in ("none", ".", "tiny-llama", "tiny.yaml", "given", "a" * 300, "../..", "/dev/null", "\n"):
        yield Case("adapter", ("merge", place, f"{GIVEN}/source", "--output", "out"))
        yield Case("adapter", ("predict", place, "hello"))


def _arguments() -> Iterator[Case]:
    merged, source = f"{GIVEN}/merged", f"{GIVEN}/source"
    lines = [
        "run",
        "rnu tiny.yaml",
        "run tiny.yaml --no",
        "run tiny.yaml extra",
        "run tiny.yaml --set",
        "run tiny.yaml --set seed",
        "report none",
        "report tiny.yaml",
        "report tiny-llama",
        "learn tiny.yaml",
        "finetune tiny.yaml -a X",
        "merge",
        f"merge {merged} --output out --weight nan",
        f"merge {merged} {source} --output out --weight 1e300 --weight 1",
        f"merge {merged} {source} --output out --weight 1",
        f"merge {merged} {source} --output out --rule none",
        f"merge {merged} {source} --output out --density 2",
        f"merge {merged} {source} --output out --rank 0",
        f"merge {merged} {source} --output {GIVEN}",
        f"merge {merged} {source} --output tiny.yaml",
        f"merge {merged} {source} --output /dev/null/x",
        f"export {merged} --output out --rank 0",
        f"export {merged} --output out --rank x",
        f"export {merged} --output out --fold",
        f"export {merged} --output out --dtype int3",
        f"export {merged} --output {GIVEN}",
        f"export {merged} --output /proc/none",
        f"finetune tiny.yaml -a {merged} --ratio 1.5 --output out",
        f"finetune tiny.yaml -a {merged} --ratio nan --output out",
        f"finetune tiny.yaml -a {merged} --ratio x --output out",
        f"predict {merged}",
        f"predict {merged} hello --max-new-tokens 0",
        f"predict {merged} hello --device tpu",
        f"predict {merged} hello --backbone none",
        f"predict {merged} hello --chat",
        "compare tiny.yaml --methods none",
        "compare tiny.yaml --seeds x",
        "compare tiny.yaml --seeds 1,1",
        "compare tiny.yaml --grid 2",
        "compare tiny.yaml --grid nan",
        "compare tiny.yaml --resamples 1",
        "compare tiny.yaml --reference none",
        "compare tiny.yaml --seeds -1",
        "sweep tiny.yaml",
        "sweep tiny.yaml --param x",
        "sweep tiny.yaml --param seed=1",
        "sweep tiny.yaml --param none=1..2",
        "sweep tiny.yaml --param final.prune_ratio=0.9..0.1",
        "sweep tiny.yaml --param final.prune_ratio=0..nan",
        "sweep tiny.yaml --param final.prune_ratio=0..1/0",
        "sweep tiny.yaml --param final.prune_ratio=0..1 --trials 0",
        "sweep tiny.yaml --param final.prune_ratio=0..1 --sampler none",
        "recipes none",
        "demo --language xx",
        "init",
        "init target.jsonl",
        "init target.jsonl --language de --source none.jsonl --output new.yaml",
        "init target.jsonl --language de --output tiny.yaml",
        "init target.jsonl --language de --output /dev/null/x.yaml",
        f"run tiny.yaml --output {GIVEN}/run.json",
        "run tiny.yaml --output /dev/null",
        f"run tiny.yaml --output {GIVEN} --set seed=9",
        "run tiny.yaml --output tiny-llama",
        "run tiny.yaml --output /proc/none",
        f"evaluate tiny.yaml -a {merged} --output {GIVEN}",
        "evaluate tiny.yaml",
        f"learn tiny.yaml -a {merged} --output {GIVEN}",
    ]
    for line in lines:
        yield Case("arguments", tuple(line.split()))


def problem_of(case: Case, workspace: Path) -> str | None:
    """Run a case; return what went wrong, or None."""
    before = _tree(workspace)
    for name, content in case.files:
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_bytes(content)
    if case.link:
        (workspace / case.link).symlink_to(case.link)
    if case.pipe:
        os.mkfifo(workspace / case.pipe)
    made = _tree(workspace)
    status, said, seconds = _call(case, workspace)
    after = _tree(workspace)
    for name in sorted(after - before, reverse=True):
        path = workspace / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    shown = f"{case.note} " * bool(case.note) + " ".join(
        f"{one[:60]!r}" if len(one) > 60 else one for one in case.arguments
    )
    lines = [line for line in said.splitlines() if not line.startswith("WARNING:")]
    problem = ""
    if seconds > LONGEST:
        problem = f"took {seconds:.0f} s"
    elif "Traceback" in said:
        problem = f"stack trace: {said.strip().splitlines()[-1]}"
    elif status != 2:
        problem = f"status {status}: {said.strip()[:300]}"
    elif len(lines) != 1 or not lines[0].startswith("error:"):
        problem = f"not one line: {said[:600]!r}"
    elif after != made:
        problem = f"left over: {sorted(after ^ made)[:5]}"
    return f"{shown}: {problem}" if problem else None


def _tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def _call(case: Case, workspace: Path) -> tuple[int, str, float]:
    """The status, standard error and seconds of a case; the process is killed when it takes too long."""
    started = time.perf_counter()
    errors = workspace.parent / "errors"
    child = os.fork()
    if child == 0:
        status = 70
        try:
            signal.alarm(LONGEST + 5)
            os.chdir(workspace)
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.environ |= {"COLUMNS": "10000", "HF_HUB_OFFLINE": "1"}
            status = call(case.arguments)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, errors.read_text(encoding="utf-8", errors="replace"), time.perf_counter() - started


if __name__ == "__main__":
    main()

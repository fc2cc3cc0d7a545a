"""What people do wrong, through the real entry point: one line on standard error, status 2, nothing else, nothing written.

The reasons are those of the libraries that read the files; the tests ask for the name of the file, and what tells the reader.
"""

import gzip
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

Make = Callable[[Path], object]
Cli = Callable[..., object]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
A, B = KEY.format(0, "q_proj", "A"), KEY.format(0, "q_proj", "B")
# Nothing of these may reach a terminal: controls, line separators, bidirectional embeddings, overrides and isolates.
RAW = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; links are not followed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def recipe(text: str | bytes) -> Make:
    """The whole recipe is this."""
    return lambda work: (work / "tiny.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())


def with_line(line: str) -> Make:
    """The recipe has one more line."""
    return lambda work: (work / "tiny.yaml").write_text((work / "tiny.yaml").read_text() + line)


def setting(**settings: object) -> Make:
    """The recipe is changed by dotted path (`__` for the dot)."""

    def make(work: Path) -> None:
        content = yaml.safe_load((work / "tiny.yaml").read_text(encoding="utf-8"))
        for path, value in settings.items():
            *sections, key = path.split("__")
            place = content
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = value
        (work / "tiny.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")

    return make


RECIPES: dict[str, tuple[Make, str]] = {
    "empty": (recipe(""), r"tiny\.yaml.* keys and values"),
    "not UTF-8": (recipe(b"name: \xff"), r"tiny\.yaml"),
    "a tab": (with_line("seed:\n\t- 1\n"), r"tiny\.yaml.* line 14"),
    "a Python tag": (with_line("x: !!python/object/apply:os.mkdir [made]\n"), r"tiny\.yaml.* tag"),
    "a typo": (with_line("mertics: [f1]\n"), r"mertics.*metrics"),
    "a text for a number": (setting(lora__rank="two"), r"lora\.rank"),
    "a preset with a typo": (setting(controller__preset="papre"), r"preset is 'papre'; allowed: spread, late, paper"),
    "a template that looks inside": (setting(data__prompt="{prompt.__class__}"), r"names \{prompt\.__class__\}; allowed"),
    "an escape in a key": (with_line('"\\e[31mred": 1\n'), r"\\x1b\[31mred"),
    "a folder": (lambda work: ((work / "tiny.yaml").unlink(), (work / "tiny.yaml").mkdir()), r"no recipe 'tiny\.yaml'"),
}  # fmt: skip


def data(content: str | bytes, name: str = "target.jsonl", **settings: object) -> Make:
    """The target's file is this."""

    def make(work: Path) -> None:
        (work / "target.jsonl").unlink()
        (work / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        setting(data__target__files=[name], **settings)(work)

    return make


def rows(*changed: object, count: int = 40) -> str:
    """JSON lines of which the last are these; a text is taken as it is."""
    lines = [json.dumps({"prompt": f"target {i}: what?", "completion": f" {i}"}) for i in range(count)]
    return "\n".join([*lines, *(row if isinstance(row, str) else json.dumps(row) for row in changed)]) + "\n"


def csv(*lines: str) -> str:
    return "\n".join(["prompt,completion", *(f"p{i},c{i}" for i in range(40)), *lines]) + "\n"


def truncated_parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    column = [f"text {i}" for i in range(60)]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column, "completion": column}), sink)
    return sink.getvalue()[:400]


DATA: dict[str, tuple[Make, str]] = {
    "empty": (data(b""), r"target\.jsonl holds no records"),
    "not UTF-8": (data(rows().encode() + b'{"prompt": "\xe9"}\n'), r"target\.jsonl, line 41: not UTF-8"),
    "UTF-16": (data(rows().encode("utf-16")), r"target\.jsonl, line 1: not UTF-8 .* save the file as UTF-8"),
    "gzip by another name": (data(gzip.compress(rows().encode()), "t.csv"), r"t\.csv, .* if it is compressed, unpack it"),
    "a workbook by another name": (data(b"PK\x03\x04\xff", "t.csv"), r"t\.csv, .* give it the suffix \.xlsx"),
    "a workbook that is none": (data(b"PK\x03\x04rest", "t.xlsx"), r"t\.xlsx: "),
    "truncated parquet": (data(truncated_parquet(), "t.parquet"), r"t\.parquet: "),
    "an unknown suffix": (data(rows(), "t.exe"), r"t\.exe: cannot tell the format from the suffix '\.exe'"),
    "a broken line": (data(rows('{"prompt": ')), r"target\.jsonl, line 41: Expecting value"),
    "deep JSON": (data(rows('{"prompt": ' + "[" * 50_000 + "]" * 50_000 + "}")), r"line 41: .*recursion"),
    "a line of another kind": (data(rows("[1]")), r"line 41: expected an object with named fields, found list"),
    "half a character": (data(rows({"prompt": "\ud800", "completion": "c"})), r"line 41: prompt holds half of a surrogate"),
    "an answer that is null": (data(rows({"prompt": "a", "completion": None})), r"line 41: completion is empty; .*skip"),
    "an answer that is a number": (data(rows({"prompt": "a", "completion": 1})), r"completion must be a text, found int"),
    "no column": (data(rows({"\x1b[31m": 1, "prompt": "a"})), r"line 41: no column 'completion'; found: \\x1b\[31m, prompt"),
    "ids twice": (data(rows(*[{"id": 7, "prompt": "a", "completion": "b"}] * 2, count=0)), r"1 ids stand more than once"),
    "an id that is a fraction": (data(rows({"id": 1.5, "prompt": "a", "completion": "b"}, count=0)), r"id must be a text or"),
    "a ragged row": (data(csv("a,b,c"), "t.csv"), r"t\.csv, line 42: the number of cells differs from the 2 columns"),
    "an open quote": (data(csv('a,"b'), "t.csv"), r"t\.csv, line 42: not valid CSV \(unexpected end of data\)"),
    "a column twice": (data("prompt,prompt,completion\na,b,c\n", "t.csv"), r"line 1: the column 'prompt' stands twice"),
    "a folder": (
        lambda work: ((work / "target.jsonl").unlink(), (work / "target.jsonl").mkdir()), r"'target\.jsonl' is missing"
    ),
    "a home that does not exist": (setting(data__target__files=["~nobody-there/x.csv"]), r"data file '~nobody-there/x\.csv'"),
}  # fmt: skip


def adapter(change: Make) -> Make:
    """The recipe names the folder `adapter`, in which this is changed."""

    def make(work: Path) -> None:
        change(work / "adapter")
        setting(source__adapters=["adapter"])(work)

    return make


def config(**changes: object) -> Make:
    return adapter(lambda folder: write_json(folder / CONFIG, json.loads((folder / CONFIG).read_text()) | changes))


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Make:
    def make(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, folder / WEIGHTS)

    return adapter(make)


ADAPTERS: dict[str, tuple[Make, str]] = {
    "a pickle": (adapter(lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin")), r"pickle"),
    "no config": (adapter(lambda folder: (folder / CONFIG).unlink()), r"adapter_config\.json"),
    "a config that is no JSON": (adapter(lambda folder: (folder / CONFIG).write_bytes(b"\xff")), r"adapter_config\.json"),
    "truncated weights": (adapter(lambda folder: (folder / WEIGHTS).write_bytes(b"\x00" * 50)), r"adapter"),
    "a factor missing": (tensors(lambda content: content.pop(B)), r"q_proj"),
    "NaN": (tensors(lambda content: content[A].fill_(float("nan"))), r"q_proj.* NaN"),
    "DoRA": (config(use_dora=True), r"DoRA"),
    "another type": (config(peft_type="IA3"), r"IA3"),
}  # fmt: skip


def backbone(name: str, content: bytes | dict) -> Make:
    """The working folder has a backbone of its own, with one file changed."""

    def make(work: Path) -> None:
        link = work / "tiny-llama"
        source = link.resolve()
        link.unlink()
        shutil.copytree(source, link)
        file = link / name
        file.write_bytes(
            json.dumps(json.loads(file.read_text()) | content).encode() if isinstance(content, dict) else content
        )

    return make


BACKBONES: dict[str, tuple[Make, str]] = {
    "an adapter": (backbone(CONFIG, b"{}"), r"adapter"),
    "a truncated model": (backbone("model.safetensors", b"\x00" * 50), r"tiny-llama"),
    "a config of another shape": (backbone("config.json", {"hidden_size": 64}), r"tiny-llama"),
    "own code": (
        backbone("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}), r"trust_remote_code"
    ),
    "a tokenizer that is empty": (backbone("tokenizer.json", b"{}"), r"tiny-llama"),
}  # fmt: skip

TABLES = {"recipe": RECIPES, "data": DATA, "adapter": ADAPTERS, "backbone": BACKBONES}


def write_tiny_adapter(folder: Path) -> None:
    """Write an adapter of the tiny backbone as PEFT would."""
    generator = np.random.default_rng(1)
    folder.mkdir()
    save_file(
        {
            KEY.format(layer, module, factor): torch.tensor(generator.normal(size=shape), dtype=torch.float32)
            for layer in (0, 1)
            for module, d_out in (("q_proj", 32), ("v_proj", 16))
            for factor, shape in (("A", (2, 32)), ("B", (d_out, 2)))
        },
        folder / WEIGHTS,
    )
    facts = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    write_json(folder / CONFIG, facts | {"base_model_name_or_path": "tiny-llama"})


@pytest.fixture
def workspace(tiny_workspace: Path) -> Path:
    """The working folder with an adapter of the backbone in it."""
    write_tiny_adapter(tiny_workspace / "adapter")
    return tiny_workspace


def check_refusal(result: object, message: str) -> None:
    status, out, err = result.status, result.out, result.err  # type: ignore[attr-defined]
    assert (status, out) == (2, ""), err
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert re.search(message, err), err
    assert not RAW.search(err.removesuffix("\n")), ascii(err)


def test_what_is_unharmed_passes(workspace, cli):
    adapter(lambda folder: None)(workspace)
    assert cli("check", "tiny.yaml").status == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, cases in TABLES.items() for name in cases])
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(table, name, workspace, cli):
    make, message = TABLES[table][name]
    make(workspace)
    before = contents(workspace)
    check_refusal(cli("check", "tiny.yaml"), message)
    assert contents(workspace) == before
    assert not (workspace / "made").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "no\x1b[31mred"], r"there is no recipe 'no\\x1b\[31mred'"),
        (["check", "tiny.yaml", "-s", "seed=!!python/name:os.system"], r"tag"),
        (["check", "tiny.yaml", "-s", "=" * 50], r"must look like a\.b=value"),
        (["merge", "adapter", "a\x1b[31m/b", "-o", "out"], r"there is no such folder, and it is no hub id either"),
        (["merge", "adapter", "-o", "tiny.yaml/out"], r"tiny\.yaml/out cannot be made \(tiny\.yaml is a file\)"),
        (["predict", "adapter", "hi", "--backbone", "~nobody-there/x"], r"'~nobody-there/x' does not exist"),
        (["predict", "adapter", "hi", "--chat"], r"has no chat template, so prompts can only be plain texts, .*--chat out"),
        (["predict", "tiny-llama", "hi"], r"adapter_config\.json"),
        (["init", "adapter/" + WEIGHTS, "-l", "de"], r"cannot tell the format from the suffix '\.safetensors'"),
        (["init", "adapter", "-l", "de"], r"data file 'adapter' is missing: .* is not a file"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_in_one_line_and_nothing_is_written(arguments, message, workspace, cli):
    before = contents(workspace)
    check_refusal(cli(*arguments), message)
    assert contents(workspace) == before


def test_code_of_others_is_announced(workspace, cli):
    setting(backbone__trust_remote_code=True)(workspace)
    result = cli("check", "tiny.yaml")
    assert result.status == 0  # type: ignore[attr-defined]
    assert "trust_remote_code is on: Python code that comes with tiny-llama" in result.err  # type: ignore[attr-defined]


def test_texts_that_are_taken_reach_the_terminal_harmless(workspace, cli):
    lines = [json.dumps({"prompt": f"p\x1b[2J{i}", "completion": f"\u202ec\x07{i}\u2028"}) for i in range(40)]
    data("\n".join(lines))(workspace)
    result = cli("check", "tiny.yaml")
    assert result.status == 0, result.err  # type: ignore[attr-defined]
    assert "characters removed 80" in result.out  # type: ignore[attr-defined]
    assert not RAW.search(result.out.replace("\n", ""))  # type: ignore[attr-defined]

"""Files that are broken or closed, in every place of every command: one line on standard error, status 2, nothing written.

The reasons are those of the libraries that read the files; the tests ask for the name of the file, and what tells the reader.
"""

import ctypes
import io
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from conftest import TINY_RECIPE, CliResult, write_tiny_workspace
from pyarrow import parquet
from safetensors.torch import save_file

Cli = Callable[..., CliResult]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
# Nothing of these may reach a terminal: controls, line separators, bidirectional embeddings, overrides and isolates.
RAW = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def workbook(sheet: bytes) -> bytes:
    """A zip archive, as a workbook is one; its sheet unpacks to this."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sheet1.xml", sheet)
    return packed.getvalue()


def table() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"prompt": ["a"] * 60, "completion": ["b"] * 60}), sink)
    return sink.getvalue()


ROWS = "".join(json.dumps({"prompt": f"target {i}: what?", "completion": f" {i}"}) + "\n" for i in range(40))
FOLDER, OWN = object(), {"model_type": "own"}
# What is wrong: the file (t.* is the target's), its content (None: it is gone; a dict: keys that change), what the line says.
BROKEN: dict[str, tuple[str, object, str]] = {
    "a recipe that is not UTF-8": ("tiny.yaml", b"name: \xff", r"tiny\.yaml"),
    "a Python tag": ("tiny.yaml", TINY_RECIPE + "x: !!python/object/apply:os.mkdir [made]\n", r"tiny\.yaml.* tag"),
    "an escape in a key": ("tiny.yaml", TINY_RECIPE + '"\\e[31mred": 1\n', r"\\x1b\[31mred"),
    "a folder for a recipe": ("tiny.yaml", FOLDER, r"no recipe 'tiny\.yaml'"),
    "a workbook that is none": ("t.xlsx", workbook(b"x"), r"t\.xlsx: "),
    "a truncated workbook": ("t.xlsx", workbook(b"x" * 900)[:60], r"t\.xlsx: "),
    "truncated parquet": ("t.parquet", table()[:400], r"t\.parquet: "),
    "a broken line": ("t.jsonl", ROWS + '{"prompt": ', r"t\.jsonl, line 41: "),
    "deep JSON": ("t.jsonl", ROWS + '{"prompt": ' + "[" * 50_000 + "]" * 50_000 + "}", r"line 41: .*recursion"),
    "a missing column": ("t.jsonl", ROWS + '{"\\u001b[31m": 1, "prompt": "a"}', r"no column 'completion'; found: \\x1b\[31m"),
    "a pickle for weights": (f"adapter/{WEIGHTS}", None, r"a pickle \(\.bin\) is never loaded"),
    "a pickle by another name": (f"adapter/{WEIGHTS}", b"\x80\x04" + b"x" * 99, r"adapter"),
    "a config that is no JSON": (f"adapter/{CONFIG}", b"\xff", r"adapter_config\.json"),
    "DoRA": (f"adapter/{CONFIG}", {"use_dora": True}, r"DoRA"),
    "an adapter for a backbone": (f"tiny-llama/{CONFIG}", "{}", r"adapter"),
    "a truncated backbone": ("tiny-llama/model.safetensors", b"\x00" * 50, r"tiny-llama"),
    "a backbone with code": ("tiny-llama/config.json", {"auto_map": {"AutoConfig": "a.A"}} | OWN, r"trust_remote_code"),
    "an empty tokenizer": ("tiny-llama/tokenizer.json", "{}", r"tiny-llama"),
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_tiny_adapter(folder: Path) -> None:
    """Write an adapter of the tiny backbone as PEFT would, and a pickle beside it."""
    generator = np.random.default_rng(1)
    folder.mkdir()
    tensors = {
        KEY.format(layer, module, factor): torch.tensor(generator.normal(size=shape), dtype=torch.float32)
        for layer in (0, 1)
        for module, d_out in (("q_proj", 32), ("v_proj", 16))
        for factor, shape in (("A", (2, 32)), ("B", (d_out, 2)))
    }
    save_file(tensors, folder / WEIGHTS)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nmkdir\n(Vmade\ntR.")
    facts = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / CONFIG).write_text(json.dumps(facts | {"base_model_name_or_path": "tiny-llama"}))


@pytest.fixture
def workspace(tiny_workspace: Path) -> Path:
    """The working folder with an adapter in it, and a backbone of its own."""
    write_tiny_adapter(tiny_workspace / "adapter")
    backbone = (tiny_workspace / "tiny-llama").resolve()
    (tiny_workspace / "tiny-llama").unlink()
    shutil.copytree(backbone, tiny_workspace / "tiny-llama")
    return tiny_workspace


def check_refusal(result: CliResult, message: str = "") -> None:
    assert (result.status, result.out) == (2, ""), result.err
    assert re.fullmatch(r"error: [^\n]+\n", result.err), result.err
    assert re.search(message, result.err), result.err
    assert not RAW.search(result.err.removesuffix("\n")), ascii(result.err)


def check_with(name: str = "tiny.yaml") -> tuple[str, ...]:
    data = ("-s", f"data.target.files=[{name}]") if name.startswith("t.") else ()
    return ("check", "tiny.yaml", "-s", "source.adapters=[adapter]", *data)


def test_what_is_whole_passes_and_code_of_others_is_announced(workspace: Path, cli: Cli) -> None:
    with_code = (*check_with(), "-s", "backbone.trust_remote_code=true", "-s", f"seed={10**20}")
    check_refusal(
        cli(*with_code), r"runs Python code that comes with 'tiny-llama'; read it, then allow it with --allow-code"
    )
    result = cli(*with_code, "--allow-code")
    assert result.status == 0, result.err
    assert "trust_remote_code is on: Python code that comes with tiny-llama" in result.err


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_one_line_and_nothing_is_written(what: str, workspace: Path, cli: Cli) -> None:
    name, content, message = BROKEN[what]
    file = workspace / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.unlink(missing_ok=True)
    if content is FOLDER:
        file.mkdir()
    elif content is not None:
        file.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    before = contents(workspace)
    check_refusal(cli(*check_with(name)), message)
    assert contents(workspace) == before
    assert not (workspace / "made").exists()


def test_texts_that_are_taken_reach_the_terminal_harmless(workspace: Path, cli: Cli) -> None:
    rows = [{"prompt": f"p\x1b[2J{i}", "completion": f"\u202ec\x07{i}\u2028"} for i in range(40)]
    (workspace / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = cli(*check_with("t.jsonl"))
    assert result.status == 0, result.err
    assert "characters removed 80" in result.out
    assert not RAW.search(result.out.replace("\n", ""))


READ = [  # PATH is what cannot be read
    "check PATH",
    "check tiny.yaml -s data.target.files=[PATH]",
    "check tiny.yaml -s backbone.name=PATH",
    "run tiny.yaml -s target.adapter=PATH -o out",
    "compare PATH -o out",
    "merge adapter PATH -o out",
    "export PATH --gguf -o out",
    "predict PATH hi",
    "predict adapter PATH/rows.csv",
    "init PATH -l de -o new.yaml",
    "init target.jsonl -l de --source PATH -o new.yaml",
]
WRITTEN = [
    "run tiny.yaml -o PATH",
    "demo -s backbone.name=tiny-llama -o PATH",
    "compare tiny.yaml -o PATH",
    "merge adapter -o PATH",
    "export adapter --gguf -o PATH",
    "init target.jsonl -l de -o PATH/new.yaml",
    "predict adapter target.jsonl -o PATH.csv",
]
LONG = "n" * 256
CLOSED, SEALED = ("shut/adapter", "mute.jsonl", "loop/x", LONG), ("shut/x", "sealed/x", "mute.jsonl/x", LONG)
# Every command with one kind of place, and every kind of place with one command that reads and one that writes.
CASES = [(command, CLOSED[number % 4]) for number, command in enumerate(READ)] + [
    (READ[1], path) for path in CLOSED[2:]
]
CASES += [(command, SEALED[number % 4]) for number, command in enumerate(WRITTEN)]


class _Powers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """Let file permissions count for root, too: this thread gives up its two powers over them."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root may read everything")
    libc, header, before = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (_Powers * 2)()
    libc.capget(header, before)
    mine = type(before).from_buffer_copy(before)
    mine[0].effective &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    if libc.capset(header, mine) or libc.prctl(28, 4, 0, 0, 0):  # os.access goes by what is effective
        pytest.skip("root may read everything here")
    yield
    libc.prctl(28, 0, 0, 0, 0)
    libc.capset(header, before)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path) -> Path:
    """A working folder with places that are closed to an ordinary user."""
    work = tmp_path_factory.mktemp("closed") / "work"
    write_tiny_workspace(work, tiny_backbone_folder)
    write_tiny_adapter(work / "adapter")
    shutil.copytree(work / "adapter", work / "shut" / "adapter")
    shutil.copy(work / "target.jsonl", work / "mute.jsonl")
    (work / "loop").symlink_to("loop")
    (work / "sealed").mkdir()
    for name, mode in (("mute.jsonl", 0), ("sealed", 0o555), ("shut", 0)):
        (work / name).chmod(mode)
    return work


@pytest.mark.usefixtures("ordinary_user")
@pytest.mark.parametrize(("command", "path"), CASES, ids=lambda text: text[:16])
def test_a_closed_place_is_one_line_and_nothing_is_written(
    command: str, path: str, places: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places)
    before = set(places.iterdir())
    check_refusal(cli(*(part.replace("PATH", path) for part in command.split(" "))))
    assert set(places.iterdir()) == before

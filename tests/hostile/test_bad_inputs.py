"""Bad and hostile inputs through the real entry point: one line on standard error, status 2, nothing else, nothing written."""

import gzip
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

Make = Callable[[Path], None]
Cli = Callable[..., object]

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "grasp_lora.json"
KEY = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
A, B = KEY.format(0, "q_proj", "A"), KEY.format(0, "q_proj", "B")
# Nothing of these may reach a terminal: controls, line separators, bidirectional embeddings, overrides and isolates.
RAW = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; links are not followed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Recipes


def recipe(text: str | bytes) -> Make:
    """The whole recipe is this."""
    data = text if isinstance(text, bytes) else text.encode()
    return lambda work: (work / "tiny.yaml").write_bytes(data) and None


def with_line(line: str) -> Make:
    """The recipe has one more line."""
    return lambda work: (work / "tiny.yaml").write_text((work / "tiny.yaml").read_text() + line) and None


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


def special(kind: str) -> Make:
    """The recipe is no regular file."""

    def make(work: Path) -> None:
        file = work / "tiny.yaml"
        file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind == "pipe":
            os.mkfifo(file)
        else:
            file.symlink_to("/dev/zero" if kind == "device" else "tiny.yaml")

    return make


ANCHOR_BOMB = "a: &a [x,x]\n" + "".join(f"b{n}: &b{n} [*a,*a]\n" for n in range(30))

RECIPES: dict[str, tuple[Make, str]] = {
    "empty": (recipe(""), r"must hold keys and values"),
    "a list": (recipe("- a\n"), r"must hold keys and values"),
    "not UTF-8": (recipe(b"name: \xff"), r"is not UTF-8 text"),
    "UTF-16": (recipe("name: tiny\n".encode("utf-16")), r"is not UTF-8 text"),
    "NUL": (recipe("name: a\x00b\n"), r"no valid YAML: unacceptable character #x0000"),
    "too large": (recipe("# " + "x" * 1_000_000), r"has 1000002 bytes; at most 1000000 are allowed"),
    "brackets": (recipe("[" * 400_000), r"nested too deeply; a recipe has at most 20 levels"),
    "braces": (recipe("{a: " * 100_000), r"nested too deeply"),
    "dashes": (recipe("- " * 100_000), r"nested too deeply"),
    "anchor bomb": (recipe(ANCHOR_BOMB), r"uses a YAML alias \(\*name\) in line 2"),
    "a Python tag": (with_line("x: !!python/object/apply:os.system [id]\n"), r"uses a YAML tag \(!name\) in line 13"),
    "a plain tag": (with_line("seed: !!int ''\n"), r"uses a YAML tag"),
    "two documents": (with_line("---\nname: b\n"), r"no valid YAML in line 13: but found another document"),
    "a tab": (with_line("seed:\n\t- 1\n"), r"no valid YAML in line 14: found character '\\t'"),
    "a key twice": (with_line("seed: 1\nseed: 2\n"), r"in line 14: the key 'seed' stands twice"),
    "a key twice in a section": (with_line("mask: {score: magnitude, score: input_aware}\n"), r"'score' stands twice"),
    "a merge key": (with_line("mask: {<<: {score: magnitude}}\n"), r"merge keys \(<<\) are not understood"),
    "a key that is a number": (with_line("7: x\n"), r"line 13: the key '7' is no text; put it in quotes"),
    "a key that YAML takes for false": (with_line("no: x\n"), r"the key 'no' is no text; put it in quotes"),
    "a key that is a list": (with_line("? [a]\n: x\n"), r"the key a list or an object is no text"),
    "a date": (with_line("metrics: [2024-01-01]\n"), r"metrics\.0: must be a text \(it is 2024-01-01\); put it in quotes"),
    "a date that does not exist": (with_line("seed: 2024-13-01\n"), r"no valid YAML: month must be in"),
    "an octal number": (with_line("seed: 010\n"), r"line 13: the number '010' would be read in base 60 or 8"),
    "a number of base 60": (with_line("seed: 1:30\n"), r"line 13: the number '1:30' would be read in base 60 or 8"),
    "a number of 5000 digits": (with_line("seed: " + "9" * 5000 + "\n"), r"no valid YAML: Exceeds the limit"),
    "a huge seed": (with_line("seed: " + "9" * 300 + "\n"), r"seed: must be at most 9223372036854775807 \(it is a huge"),
    "a seed that is true": (with_line("seed: yes\n"), r"seed: must be a number \(it is True\)"),
    "epochs that are true": (setting(final__training__epochs=True), r"final\.training\.epochs: must be a number"),
    "a switch that is 1": (setting(backbone__trust_remote_code=1), r"backbone\.trust_remote_code: must be true or false"),
    "NaN as text": (setting(merge__density="nan"), r"density is nan|density: must be a finite number"),
    "infinity": (setting(lora__alpha=float("inf")), r"alpha is inf"),
    "a rank to fill the memory": (setting(lora__rank=10**8), r"lora\.rank: must be at most 16384 \(it is 100000000\)"),
    "candidates without end": (setting(controller__policy={"candidates": 10**7}), r"policy\.candidates: must be at most 1024"),
    "a text that is a number": (setting(name=7), r"name: must be a text \(it is 7\); put it in quotes"),
    "a name that is a path": (setting(name="../../up"), r"name: use Latin letters"),
    "a name too long for a folder": (setting(name="x" * 300), r"name: .*at most 100 characters"),
    "an escape sequence": (with_line('report_to: ["\\e[31mred"]\n'), r"report_to\.0: holds the character U\+001B"),
    "an override of direction": (with_line('metrics: ["a\\u202Eb"]\n'), r"metrics.*|metrics\.0: holds the character U\+202E"),
    "a NUL in a path": (setting(data__root="a\x00b"), r"data\.root: holds the character U\+0000"),
    "half a character": (recipe('name: tiny\nbackbone: {name: "\\uD800"}\ndata: {task: qa, target: {language: de, '
                                'files: [x]}}\n'), r"backbone\.name: holds the character U\+D800"),
    "a path that is too long": (setting(data__target__files=["a/" * 600]), r"files\.0: has 1200 characters; at most 1024"),
    "a file name that is too long": (setting(data__target__files=["x" * 300]), r"files\.0: holds a name of more than 255"),
    "an escape in a key": (with_line('"\\e[31mred": 1\n'), r"unknown key '\\x1b\[31mred'"),
    "a long key": (with_line("x" * 900 + ": 1\n"), r"unknown key 'x{80}'\.\.\."),
    "an empty adapter": (setting(target__adapter=" "), r"target: adapter is empty; give a folder or a hub id"),
    "merge weights to overflow": (setting(merge__weights=[1e300, 1]), r"merge weights are \[1e\+300, 1\.0\]; each must lie in"),
    "merge weights of zero": (setting(merge__weights=[0, 0]), r"merge weights are \[0\.0, 0\.0\].*one must not be 0"),
    "ranks that add up to more than an adapter may have": (
        setting(lora__rank=10_000), r"'exact' adds up the ranks \[10000, 10000\], but an adapter has at most rank 16384"
    ),
    "a preset that is a list": (setting(controller__preset=["paper"]), r"controller\.preset is a list; allowed: spread"),
    "a preset with a typo": (setting(controller__preset="papre"), r"preset is 'papre'; allowed: spread, late, paper"),
    "a template that looks inside": (setting(data__prompt="{prompt.__class__}"), r"names \{prompt\.__class__\}; allowed fields"),
    "a template with an index": (setting(data__prompt="{prompt[0]}"), r"names \{prompt\[0\]\}; allowed fields"),
    "a template with a width": (setting(data__prompt="{prompt:>999999999}"), r"names \{prompt:>999999999\}"),
    "a folder": (special("folder"), r"there is no recipe 'tiny\.yaml'"),
    "a pipe": (special("pipe"), r"there is no recipe 'tiny\.yaml'"),
    "a device": (special("device"), r"there is no recipe 'tiny\.yaml'"),
    "a link to itself": (special("loop"), r"there is no recipe 'tiny\.yaml'"),
}  # fmt: skip


# Data


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


def parquet(cut: int | None) -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    column = [f"text {i}" for i in range(60)]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column, "completion": column}), sink)
    return sink.getvalue()[:cut]


def special_data(kind: str) -> Make:
    def make(work: Path) -> None:
        file = work / "target.jsonl"
        file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind == "pipe":
            os.mkfifo(file)
        else:
            file.symlink_to("target.jsonl" if kind == "loop" else "/dev/zero")

    return make


def squad(identity: object) -> str:
    question = {"id": identity, "question": "who?", "answers": [{"text": "She", "answer_start": 0}]}
    return json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "She came.", "qas": [question]}]}]})


MISSING = r"data file 'target\.jsonl' is missing"
DATA: dict[str, tuple[Make, str]] = {
    "empty": (data(b""), r"target\.jsonl is empty"),
    "a mark and nothing else": (data(b"\xef\xbb\xbf\n"), r"target\.jsonl is empty"),
    "not UTF-8": (data(rows().encode() + b'{"prompt": "\xe9"}\n'), r"target\.jsonl, line 41: not UTF-8"),
    "UTF-16": (data(rows().encode("utf-16")), r"target\.jsonl is in UTF-16: save it as UTF-8"),
    "gzip by another name": (data(gzip.compress(rows().encode()), "t.csv"), r"t\.csv is compressed with gzip: unpack it"),
    "a workbook by another name": (data(b"PK\x03\x04rest", "t.csv"), r"t\.csv is a zip archive or an Excel workbook"),
    "parquet by another name": (data(parquet(None), "t.jsonl"), r"t\.jsonl is a parquet file: give it the suffix"),
    "truncated parquet": (data(parquet(400), "t.parquet"), r"t\.parquet: not a valid parquet file"),
    "parquet without a body": (data(b"PAR1" * 3, "t.parquet"), r"t\.parquet: not a valid parquet file"),
    "an unknown suffix": (data(rows(), "t.exe"), r"t\.exe: cannot tell the format from the suffix '\.exe'"),
    "a broken line": (data(rows('{"prompt": ')), r"line 41: not valid JSON"),
    "a line of another kind": (data(rows("[1]")), r"line 41: expected an object with named fields, found list"),
    "NaN": (data(rows('{"prompt": "a", "completion": NaN}')), r"line 41: not valid JSON \(NaN is none of its numbers\)"),
    "a number without end": (data(rows('{"prompt": ' + "9" * 5000 + "}")), r"line 41: .*thousands of digits"),
    "deep JSON": (data(rows('{"prompt": ' + "[" * 5000 + "]" * 5000 + "}")), r"line 41: nested deeper than 64 levels"),
    "deep JSON of objects": (data('{"data": ' * 90 + "1" + "}" * 90, "t.json"), r"t\.json: nested deeper than 64 levels"),
    "a key twice": (data(rows('{"prompt": "a", "prompt": "b", "completion": "c"}')), r"line 41: .*'prompt' stands twice"),
    "a raw control character": (data(rows('{"prompt": "a\x1b", "completion": "c"}')), r"line 41: .*Invalid control char"),
    "half a character": (data(rows({"prompt": "\ud800", "completion": "c"})), r"line 41: prompt holds half of a surrogate"),
    "an empty answer": (data(rows({"prompt": "a", "completion": ""})), r"line 41: completion is empty"),
    "an answer of controls": (data(rows({"prompt": "a", "completion": "\x00\x1b"})), r"line 41: completion is empty"),
    "an answer that is null": (data(rows({"prompt": "a", "completion": None})), r"line 41: completion is empty; .*skip"),
    "a chat with two system turns": (
        data(rows({"messages": [{"role": one, "content": "a"} for one in ("system", "system", "user", "assistant")]})),
        r"line 41: messages has 2 system messages; one is understood",
    ),
    "a workbook that is none": (data(b"PK\x03\x04rest", "t.xlsx"), r"t\.xlsx: not a valid \.xlsx workbook"),
    "an answer that is a number": (data(rows({"prompt": "a", "completion": 1})), r"completion must be a text, found int"),
    "a text without end": (data(rows({"prompt": "a" * 1_000_001, "completion": "c"})), r"line 41: prompt has 1000001 char"),
    "a line without end": (data(rows('{"a": "' + "x" * 10_000_000 + '"}')), r"line 41 has 100\d+ characters; at most"),
    "no column": (data(rows({"prompt": "a"})), r"line 41: no column 'completion'; found: prompt"),
    "an escape in a column": (data(rows({"\x1b[31m": 1, "prompt": "a"})), r"no column 'completion'; found: \\x1b\[31m, p"),
    "ids twice": (data(rows(*[{"id": 7, "prompt": "a", "completion": "b"}] * 2, count=0)), r"1 ids stand more than once"),
    "ids that are one as text": (
        data(rows(*({"id": i, "prompt": "a", "completion": "b"} for i in (7, "7")), count=0)), r"1 ids stand more than"
    ),
    "an id that is a list": (data(rows({"id": [[1]], "prompt": "a", "completion": "b"}, count=0)), r"line 1: id must be a"),
    "an id that is a fraction": (data(rows({"id": 1.5, "prompt": "a", "completion": "b"}, count=0)), r"id must be a text or"),
    "an escape in an id": (
        data(rows({"id": "a\x1b[2J", "prompt": "a", "completion": "b"}, count=0)), r"line 1: id holds the control .* U\+001B"
    ),
    "a direction in an id": (
        data(rows({"id": "a\u202eb", "prompt": "a", "completion": "b"}, count=0)), r"line 1: id holds the control .* U\+202E"
    ),
    "a line break in an id": (
        data(rows({"id": "a\nerror: b", "prompt": "a", "completion": "b"}, count=0)), r"id holds the control .* U\+000A"
    ),
    "an id without end": (data(rows({"id": "x" * 501, "prompt": "a", "completion": "b"}, count=0)), r"id has 501 characters"),
    "an escape in a SQuAD id": (data(squad("q\x1b"), "t.json", data__task="qa"), r"article 1: id holds the control char"),
    "SQuAD for another task": (data(squad("q"), "t.json"), r"is SQuAD data, which fits the task qa"),
    "SQuAD of numbers": (data('{"data": [1, 2]}', "t.json", data__task="qa"), r"record 1: expected an object with named f"),
    "a ragged row": (data(csv("a,b,c"), "t.csv"), r"t\.csv, line 42: the number of cells differs from the 2 columns"),
    "an open quote": (data(csv('a,"b'), "t.csv"), r"t\.csv, line 42: not valid CSV \(unexpected end of data\)"),
    "a column twice": (data("prompt,prompt,completion\na,b,c\n", "t.csv"), r"line 1: the column 'prompt' stands twice"),
    "columns without end": (data(",".join(f"c{i}" for i in range(10_001)) + "\n1\n", "t.csv"), r"10001 columns; at most"),
    "only a header": (data("prompt,completion\n", "t.csv"), r"t\.csv holds no records"),
    "a folder": (special_data("folder"), MISSING),
    "a pipe": (special_data("pipe"), MISSING),
    "a device": (special_data("device"), MISSING),
    "a link to itself": (special_data("loop"), MISSING),
    "a home that does not exist": (setting(data__target__files=["~nobody-there/x.csv"]), r"data file '~nobody-there/x\.csv'"),
}  # fmt: skip


# Adapters


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


def write(name: str, content: str | bytes) -> Make:
    return adapter(
        lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    )


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Make:
    def make(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, folder / WEIGHTS)

    return adapter(make)


def header(change: Callable[[dict], object], extra: bytes = b"") -> Make:
    """The header of the weights is changed, and the data stays."""

    def make(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        facts = json.loads(content[8 : 8 + length])
        changed = change(facts)
        text = changed if isinstance(changed, bytes) else json.dumps(facts).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :] + extra)

    return adapter(make)


def weights(change: Callable[[bytes], bytes]) -> Make:
    return adapter(lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes())))


def instead(kind: str) -> Make:
    """In the place of the weights stands something else."""

    def make(folder: Path) -> None:
        file = folder / WEIGHTS
        content = file.read_bytes()
        file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind == "pipe":
            os.mkfifo(file)
        elif kind == "device":
            file.symlink_to("/dev/zero")
        elif kind == "nowhere":
            file.symlink_to("gone")
        elif kind == "shards":
            (folder / "adapter_model-00001-of-00002.safetensors").write_bytes(content)
            (folder / "adapter_model.safetensors.index.json").write_text("{}")
        else:
            (folder / kind).write_bytes(b"\x80\x04cos\nsystem\n")

    return adapter(make)


def twice(facts: dict) -> bytes:
    """A header in which a factor stands once more, in the place of another."""
    return json.dumps(facts)[:-1].encode() + f', "{A}": {json.dumps(facts[B])}}}'.encode()


def renamed(name: str) -> Make:
    """The factor A of a module has another name."""
    return header(lambda facts: facts.__setitem__(name, facts.pop(A)))


def entry(**changes: object) -> Make:
    """The header describes a factor in another way."""
    return header(lambda facts: facts[A].update(changes))


def typed(dtype: torch.dtype) -> Make:
    return tensors(lambda content: content.update({A: content[A].to(dtype)}))


NOTHING = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
TERABYTES = {"dtype": "F32", "shape": [2, 2**40], "data_offsets": [0, 2**43]}
EVIL_PATTERN = {"(.*)*" * 20 + "(?=x)": 4}
ADAPTERS: dict[str, tuple[Make, str]] = {
    "a pickle": (instead("adapter_model.bin"), r"holds adapter_model\.bin, a pickle, which is never loaded.*save_pretrained"),
    "a pickle of torch": (instead("adapter_model.pt"), r"holds adapter_model\.pt, a pickle, which is never loaded"),
    "shards": (instead("shards"), r"the adapter is sharded\); load it with PEFT and save it again"),
    "a folder for weights": (instead("folder"), r"adapter_model\.safetensors: it is a folder, not a file"),
    "a pipe for weights": (instead("pipe"), r"it is no regular file but a pipe, a device or the like"),
    "a device for weights": (instead("device"), r"it is no regular file but a pipe, a device or the like"),
    "a link to nowhere": (instead("nowhere"), r"adapter_model\.safetensors: it cannot be read: No such file"),
    "empty weights": (weights(lambda content: b""), r"no safetensors file .header too small\)"),
    "truncated weights": (weights(lambda content: content[:-1]), r"no safetensors file .incomplete metadata"),
    "more after the weights": (weights(lambda content: content + b"x"), r"no safetensors file .incomplete metadata"),
    "a header beyond the file": (weights(lambda content: b"\xff" * 7 + content[7:]), r"no safetensors file .header too large"),
    "a pickle called safetensors": (write(WEIGHTS, b"\x80\x04" + b"x" * 99), r"no safetensors file .header too large"),
    "a header that is no text": (header(lambda facts: b"\xff\xfe{}"), r"no safetensors file .invalid UTF-8"),
    "a header that is no JSON": (header(lambda facts: b"{"), r"no safetensors file .invalid JSON"),
    "a header that is a list": (header(lambda facts: b"[]"), r"no safetensors file .*invalid type: sequence"),
    "a deep header": (header(lambda facts: b'{"a":' + b"[" * 90_000), r"no safetensors file .*recursion limit"),
    "a tensor twice": (header(twice), r"no safetensors file .invalid offset for tensor"),
    "metadata that are a list": (header(lambda facts: facts.update(__metadata__=[])), r"no safetensors file .*expected a map"),
    "terabytes": (header(lambda facts: facts.update({A: TERABYTES})), r"no safetensors file .invalid offset for tensor"),
    "a dimension of 400 digits": (entry(shape=[2, 10**400]), r"no safetensors file .*number out of range"),
    "a dimension below zero": (entry(shape=[-2, 32]), r"no safetensors file .*integer `-2`, expected usize"),
    "a dimension that is a fraction": (entry(shape=[2.0, 32]), r"no safetensors file .*`2.0`, expected usize"),
    "a dimension of zero": (header(lambda facts: facts.update(none=NOTHING)), r"none has a dimension of size 0"),
    "too many dimensions": (entry(shape=[1] * 50 + [2, 32]), r"has 52 dimensions; at most 4"),
    "a place of another size": (entry(data_offsets=[0, 1]), r"no safetensors file .invalid shape, data type, or offset"),
    "a place that ends before it begins": (entry(data_offsets=[300, 44]), r"no safetensors file .invalid offset for tensor"),
    "tensors that overlap": (
        header(lambda facts: facts[A].update(data_offsets=facts[KEY.format(1, "q_proj", "A")]["data_offsets"])),
        r"no safetensors file .invalid offset for tensor",
    ),
    "a gap between tensors": (entry(data_offsets=[10**6, 10**6 + 256]), r"no safetensors file .invalid offset for tensor"),
    "an entry that is a number": (header(lambda facts: facts.update({A: 5})), r"no safetensors file .*integer `5`, expected"),
    "whole numbers": (typed(torch.int8), r"lora_A\.weight has the dtype 'I8'; allowed: F64, F32, F16, BF16"),
    "truth values": (typed(torch.bool), r"has the dtype 'BOOL'"),
    "complex numbers": (typed(torch.complex64), r"has the dtype 'C64'"),
    "eight bits": (typed(torch.float8_e4m3fn), r"has the dtype 'F8_E4M3'"),
    "a dtype that is a list": (entry(dtype=["F32"]), r"no safetensors file .*invalid type: sequence"),
    "a path for a name": (renamed("../../../etc/passwd"), r"a tensor named '\.\./\.\./\.\./etc/passwd'; a name is at most 512"),
    "dots for a name": (renamed("base_model.model...lora_A.weight"), r"a tensor named 'base_model\.model\.\.\.lora_A\.weight'"),
    "an escape in a name": (renamed("\x1b[2J.lora_A.weight"), r"a tensor named '\\x1b\[2J\.lora_A\.weight'"),
    "a name without end": (renamed("x" * 600), r"a tensor named 'x{80}'\.\.\."),
    "an empty name": (renamed(""), r"a tensor named ''"),
    "tensors by the hundred thousand": (
        header(lambda facts: facts.update({f"x{i}": NOTHING for i in range(100_001)})), r"tensors; at most 100000 are allowed"
    ),
    "a factor missing": (tensors(lambda content: content.pop(B)), r"q_proj has only factor A; both A and B are needed"),
    "a tensor too many": (tensors(lambda content: content.update(x=torch.ones(2, 2))), r"holds x, which is no LoRA factor"),
    "the same module twice": (
        tensors(lambda content: content.update({A.removeprefix("base_model.model."): content[A].clone()})), r"stands twice, once"
    ),
    "a module that the config does not name": (config(target_modules=["v_proj"]), r"q_proj, which target_modules .* not name"),
    "another rank": (config(r=3), r"factor A of .* has rank 2, its config says 3"),
    "NaN": (tensors(lambda content: content[A].fill_(float("nan"))), r"lora_A\.weight holds NaN or infinity"),
    "infinity": (tensors(lambda content: content[B].fill_(float("-inf"))), r"lora_B\.weight holds NaN or infinity"),
    "infinity in float32": (
        tensors(lambda content: content.update({A: content[A].double() + 1e300})), r"lora_A\.weight holds NaN or infinity"
    ),
    "a config that is a list": (write(CONFIG, "[]"), r"adapter_config\.json: it must hold a JSON object"),
    "a config that is no text": (write(CONFIG, b"\xff"), r"adapter_config\.json: it is no UTF-8 text"),
    "a deep config": (write(CONFIG, "[" * 90_000), r"adapter_config\.json: nested deeper than 64 levels"),
    "a huge config": (write(CONFIG, b" " * 16_000_001), r"adapter_config\.json: it has 16000001 bytes; at most 16000000"),
    "a config with a key twice": (write(CONFIG, '{"r": 2, "r": 3}'), r"the key 'r' stands twice"),
    "another type": (config(peft_type=["LORA"]), r"is of type a list; only LORA can be merged"),
    "a rank that is a text": (config(r="2"), r"r is '2'; input should be a valid integer"),
    "a rank that is true": (config(r=True), r"r is True; input should be a valid integer"),
    "an absurd rank": (config(r=10**9), r"r is 1000000000; input should be less than or equal to 16384"),
    "alpha below zero": (config(lora_alpha=-4), r"lora_alpha is -4; input should be greater than 0"),
    "alpha NaN": (config(lora_alpha=float("nan")), r"adapter_config\.json: not valid JSON \(NaN is none of its numbers\)"),
    "alpha 1e999": (
        adapter(lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text().replace('"r": 2', '"r": 2e999'))),
        r"r is inf; input should be a valid integer",
    ),
    "alpha of 400 digits": (config(lora_alpha=10**400), r"lora_alpha is a huge number; input should be a"),
    "a switch that is a text": (config(use_rslora="no"), r"use_rslora is 'no'; input should be a valid boolean"),
    "a pattern without end": (config(rank_pattern=EVIL_PATTERN), r"no regular expression that can be matched in linear time"),
    "a pattern of megabytes": (config(alpha_pattern={"(\\w{900}){900}": 2}), r"that can be matched in linear time"),
    "patterns by the hundred": (config(rank_pattern={f"a.*{i}": 2 for i in range(65)}), r"holds over 64 regular expressions"),
    "patterns that are a list": (config(rank_pattern=[1]), r"rank_pattern is a list; input should be a valid object"),
    "a pattern for a text": (config(alpha_pattern={"q_proj": "2"}), r"alpha_pattern\.q_proj is '2'; input should be a"),
    "targets that are numbers": (config(target_modules=[1]), r"target_modules.* is 1; input should be a valid string"),
    "a base model that is an object": (config(base_model_name_or_path={}), r"base_model_name_or_path is an object; input should"),
    "an escape in the base model": (config(base_model_name_or_path="a\x1b[31m"), r"is 'a\\x1b\[31m'; control characters are"),
    "DoRA": (config(use_dora=True), r"adapter adapter uses DoRA, which cannot be merged exactly"),
    "facts that are a list": (write(OURS, "[]"), r"grasp_lora\.json: it must hold a JSON object"),
    "facts with a rank of text": (write(OURS, '{"segments": {"m": [["a", "2"]]}}'), r"segments\.m\.0\.1 is '2'.*delete that"),
    "a fingerprint that is a list": (write(OURS, '{"backbone_fingerprint": []}'), r"backbone_fingerprint is a list"),
}  # fmt: skip


def chat(template: object) -> Make:
    """The backbone has this chat template, and the recipe uses it."""

    def make(work: Path) -> None:
        change_backbone(work, "tokenizer_config.json", {"chat_template": template})
        setting(data__chat_template=True)(work)

    return make


BACKBONES: dict[str, tuple[Make, str]] = {
    "a model and an adapter in one": (
        lambda work: change_backbone(work, "adapter_config.json", b"{}"), r"is the folder of both a model and an adapter"
    ),
    "layers by the thousand million": (
        lambda work: change_backbone(work, "config.json", {"num_hidden_layers": 10**9}), r"num_hidden_layers 1000000000; at most"
    ),
    "a truncated model": (lambda work: change_backbone(work, "model.safetensors", b"\x00" * 50), r"files are damaged"),
    "a config that divides by zero": (lambda work: change_backbone(work, "config.json", {"num_attention_heads": 0}), "damaged"),
    "a config of another shape": (lambda work: change_backbone(work, "config.json", {"hidden_size": 64}), "other shapes than"),
    "kernels of the hub": (
        lambda work: change_backbone(work, "config.json", {"_attn_implementation": "evil/kernel"}),
        r"asks for compiled attention code of the hub \('evil/kernel'\)",
    ),
    "own code": (
        lambda work: change_backbone(work, "config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
        r"it needs Python code of its own; read that code, then set trust_remote_code to true",
    ),
    "stop tokens that are texts": (
        lambda work: change_backbone(work, "generation_config.json", {"eos_token_id": "abc"}), r"invalid literal for int"
    ),
    "a chat template that grows": (chat("{{ 'a' * 10**10 }}"), r"^error: target\.jsonl:\d+: .*more than 1073741824 bytes"),
    "a chat template that calls itself": (
        chat("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), r"chat template refuses it: maximum recursion depth"
    ),
    "a chat template that is no text": (chat(["a"]), r"files are damaged"),
    "a tokenizer without the letters": (
        lambda work: change_tokenizer(work, model={"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "<unk>"}),
        r"cannot encode a text",
    ),
    "a tokenizer whose pattern runs wild": (
        lambda work: change_tokenizer(
            work, normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}
        ), r"cannot encode a text \(PanicException"
    ),
    "a length that is a text": (
        lambda work: change_backbone(work, "tokenizer_config.json", {"model_max_length": "x"}), r"cannot encode .*TypeError"
    ),
    "a tokenizer that is empty": (lambda work: change_backbone(work, "tokenizer.json", b"{}"), r"files are damaged"),
}  # fmt: skip


def change_tokenizer(work: Path, **changes: object) -> None:
    change_backbone(work, "tokenizer.json", changes)
    data = work / "target.jsonl"
    data.write_text(data.read_text().replace("what?", "a" * 40 + "?"))


def change_backbone(work: Path, name: str, content: bytes | dict) -> None:
    """Give the working folder a backbone of its own, with one file changed."""
    import shutil

    link = work / "tiny-llama"
    source = link.resolve()
    link.unlink()
    shutil.copytree(source, link)
    file = link / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content).encode()
    file.write_bytes(content)


TABLES = {"recipe": RECIPES, "data": DATA, "adapter": ADAPTERS, "backbone": BACKBONES}
CASES = [(table, name) for table, cases in TABLES.items() for name in cases]


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


def check_refusal(status: int, out: str, err: str, message: str) -> None:
    assert status == 2, (out, err)
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert re.search(message, err), err
    assert not RAW.search(err.removesuffix("\n")), ascii(err)
    assert len(err) < 1500, len(err)


def test_the_inputs_are_many_and_the_unharmed_ones_pass(workspace: Path, cli: Cli) -> None:
    assert len(CASES) >= 80
    adapter(lambda folder: None)(workspace)
    assert cli("check", "tiny.yaml").status == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(("table", "name"), CASES)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    table: str, name: str, workspace: Path, cli: Cli
) -> None:
    make, message = TABLES[table][name]
    make(workspace)
    before = contents(workspace)
    result = cli("check", "tiny.yaml")
    check_refusal(result.status, result.out, result.err, message)  # type: ignore[attr-defined]
    assert contents(workspace) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "x" * 5000], r"there is no recipe 'x{80}'\.\.\."),
        (["check", "no\x1b[31mred"], r"there is no recipe 'no\\x1b\[31mred'"),
        (["check", "tiny.yaml", "-s", "seed=" + "[" * 5000], r"the value is nested too deeply"),
        (["check", "tiny.yaml", "-s", "metrics=[&a [x], *a]"], r"the value uses a YAML alias"),
        (["check", "tiny.yaml", "-s", "seed=!!python/name:os.system"], r"the value uses a YAML tag"),
        (["check", "tiny.yaml", "-s", "seed=010"], r"would be read in base 60 or 8"),
        (["check", "tiny.yaml", "-s", "seed=" + "9" * 5000], r"the value is no valid YAML; put text in quotes"),
        (["check", "tiny.yaml", "-s", "a\x1b[2J.b=1"], r"unknown key '?a\\x1b\[2J"),
        (["check", "tiny.yaml", "-s", "name.\x1b=1"], r"name is no section of the recipe"),
        (["check", "tiny.yaml", "-s", "backbone.trust_remote_code='yes'"], r"must be true or false \(it is 'yes'\)"),
        (["check", "tiny.yaml", "-s", "lora={rank: 1, rank: 2}"], r"the key 'rank' stands twice"),
        (["check", "tiny.yaml", "-s", "=" * 50], r"must look like a\.b=value"),
        (["check", "tiny.yaml", "-s", "data.target.train=1e99"], r"data\.target\.train"),
        (["check", "tiny.yaml", "-s", "target.adapter=../../../etc"], r"adapter .*etc"),
        (["merge", "adapter", "x" * 5000, "-o", "out"], r"adapter x+: .*there is no such folder|it is no hub id"),
        (["merge", "adapter", "a\x1b[31m/b", "-o", "out"], r"there is no such folder, and it is no hub id either"),
        (["predict", "adapter", "hi", "--backbone", "~nobody-there/x"], r"Backbone folder '~nobody-there/x' does not exist"),
        (["merge", "adapter", "-o", "tiny.yaml/out"], r"tiny\.yaml/out cannot be made \(tiny\.yaml is a file\); choose another"),
        (["evaluate", "tiny.yaml", "-a", "adapter", "-o", "tiny.yaml/a/b"], r"cannot be made \(tiny\.yaml is a file\)"),
        (["learn", "tiny.yaml", "-a", "adapter", "-o", "tiny.yaml/out"], r"cannot be made \(tiny\.yaml is a file\)"),
        (["check", "tiny.yaml", "-s", "report_to=[nosuch]"], r"report_to names 'nosuch'; allowed: .*tensorboard, .*wandb"),
        (["run", "tiny.yaml", "-s", "report_to=[wandb]"], r"report_to names 'wandb', which cannot be used here: .*wandb"),
        (["predict", "adapter", "hi", "--chat"], r"has no chat template, so prompts can only be plain texts, .*--chat out"),
        (["predict", "adapter", "hi", "--max-new-tokens", "0", "--backbone", "./none"], r"max_new_tokens"),
        (["predict", "tiny-llama", "hi"], r"no PEFT adapter: it has no adapter_config\.json"),
        (["init", "adapter/" + WEIGHTS, "-l", "de"], r"cannot tell the format from the suffix '\.safetensors'"),
        (["init", "adapter", "-l", "de"], r"it is a folder, not a file"),
        (["init", "/dev/zero", "-l", "de"], r"it is no regular file"),
        (["init", "x" * 300, "-l", "de", "-o", "out.yaml"], r"data file 'x{80}'\.\.\. is missing"),
        (["init", "target.jsonl", "-l", "de", "-o", "a\x1b.yaml", "--source", "a\x1b"], r"source 'a\\x1b' is missing"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_in_one_line_and_nothing_is_written(
    arguments: list[str], message: str, workspace: Path, cli: Cli
) -> None:
    before = contents(workspace)
    result = cli(*arguments)
    check_refusal(result.status, result.out, result.err.replace("x" * 1000, "x"), message)  # type: ignore[attr-defined]
    assert contents(workspace) == before


@pytest.mark.parametrize(
    ("table", "name"),
    [("recipe", "anchor bomb"), ("data", "deep JSON"), ("adapter", "terabytes")],
)
def test_so_it_is_in_a_process_of_its_own(table: str, name: str, workspace: Path) -> None:
    make, message = TABLES[table][name]
    make(workspace)
    before = contents(workspace)
    code = "from grasp_lora.cli import main; main()"
    result = forked.python(["-c", code, "check", "tiny.yaml"], workspace)
    check_refusal(result.returncode, result.stdout, result.stderr, message)
    assert contents(workspace) == before


def test_code_of_others_is_announced(workspace: Path, cli: Cli) -> None:
    setting(backbone__trust_remote_code=True)(workspace)
    result = cli("check", "tiny.yaml")
    assert result.status == 0  # type: ignore[attr-defined]
    line = "WARNING: trust_remote_code is on: Python code that comes with tiny-llama will run on this machine\n"
    assert result.err.endswith(line)  # type: ignore[attr-defined]


def test_texts_that_are_taken_reach_the_terminal_harmless(workspace: Path, cli: Cli) -> None:
    lines = [json.dumps({"prompt": f"p\x1b[2J{i}", "completion": f"\u202ec\x07{i}\u2028"}) for i in range(40)]
    data("\n".join(lines))(workspace)
    result = cli("check", "tiny.yaml")
    assert result.status == 0, result.err  # type: ignore[attr-defined]
    assert "characters removed 80" in result.out  # type: ignore[attr-defined]
    assert not RAW.search(result.out.replace("\n", ""))  # type: ignore[attr-defined]

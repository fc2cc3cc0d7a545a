"""What the fuzzers share: valid files of every kind, ways to spoil them, and readers that must take or refuse what results."""

import copy
import io
import json
import math
import random
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from grasp_lora.data.files import read_file
from grasp_lora.data.records import make_pool
from grasp_lora.errors import GraspError
from grasp_lora.models.adapters import check_fits
from grasp_lora.models.reading import CONFIG_FILE, OUR_FILE, WEIGHTS_FILE, read_adapter
from grasp_lora.recipes.load import load_recipe

MOST_MESSAGE = 4000
RAW = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

RECIPE = """\
name: tiny
seed: 7
backbone: {name: tiny-llama, dtype: float32, offline: true}
data:
  task: completion
  source: {language: en, files: [source.jsonl], train: 12, dev: 4}
  target: {language: de, files: [target.jsonl], columns: {prompt: question}, train: 10, dev: 6, micro_dev: 4, test: 8}
  prompt: "{prompt} = "
lora: {rank: 2, alpha: 4, target_modules: [q_proj, v_proj]}
source: {adapters: [one, org/two], training: {epochs: 1, batch_size: 2, learning_rate: 1.0e-2}}
target: {training: {epochs: 1, patience: null}}
merge: {rule: svd, weights: [0.5, 0.5, 1], rank: 3}
mask: {score: magnitude}
controller: {preset: paper, rounds: {every: 3}, policy: {candidates: 2}, training: {epochs: 1, keep: last}}
final: {mode: hold, prune_ratio: 0.5, mask: {score: magnitude}}
generation: {max_new_tokens: 4, stop: ["\\n"]}
metrics: [f1]
"""

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SQUAD = {
    "version": "1",
    "data": [
        {
            "title": title,
            "paragraphs": [
                {"context": f"{title} is {n}.",
                 "qas": [{"id": f"{title}{n}", "question": "what?", "answers": [{"text": str(n), "answer_start": 0}]}]}
                for n in range(2)
            ],
        }
        for title in ("a", "b")
    ],
}  # fmt: skip
ROWS: dict[str, list[dict[str, Any]]] = {
    "completion": [{"id": i, "group": i % 2, "prompt": f"p {i}", "completion": f"c\r\n{i}"} for i in range(4)],
    "messages": [{"id": f"m{i}", "messages": TURNS} for i in range(3)],
    "qa": [{"context": "blue sky", "question": "?", "title": "T", "answers": {"text": ["blue"], "answer_start": [0]}}],
    "flat qa": [{"context": "blue sky", "question": "?", "answer": "blue"}],
    "xlsum": [
        {"id": f"x{i}", "url": "u", "title": "t", "summary": "s", "text": "a \x93text\x94 \x00"} for i in range(3)
    ],
}

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 10**400, 1.5, -0.0, 1e308, math.inf, -math.inf, math.nan,
    "", " ", "\0", "\x1b[31m", "a\u202eb", "\ud800", "\u2028", "\ufeff", "../../x", "/", "~nobody/x", "x" * 300, "y" * 3000,
    "{x}", "{prompt.x}", "{", "%s", "nan", "1e999", "no", "0x1F", "1:30", "(a+)+$", "^q_proj", "(?=a)", "NaN", "paper",
    [], {}, [[]], [1], [None], ["a", "a"], {"a": 1}, {"preset": "paper"}, {"": ""}, [[["x", 1]]], {"m": [["a", 2]]},
]  # fmt: skip
TOKENS = [
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"&a [*a]", b"*a", b"!!python/object:os.system x", b"<<: ", b"? ", b"- ", b": ",
    b"\xe2\x80\xa8", b"\xed\xa0\x80", b'"', b"'", b"\\", b"\\ud800", b"\\u0000", b"\\x1b", b"NaN", b"Infinity", b"1e999",
    b"-", b"[" * 80, b"{" * 80, b"{}", b"[]", b"9" * 5000, b"\r", b"\r\n", b"\n", b",", b"\t", b"PAR1", b"PK\x03\x04",
    b"\x1f\x8b", b"|", b">", b"#", b"%YAML 9", b"---", b"...", b"null", b"true", b"\xc2\x85", b"\x7f", b"\xe2\x80\xae",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One reader under attack.

    Args:
        name: of the reader and the kind of file.
        seeds: valid inputs.
        read: takes a file's bytes; returns, or raises a GraspError.
        spoil: changes a seed in its structure, and writes it down validly.
    """

    name: str
    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]
    spoil: Callable[[bytes, random.Random], bytes]


def attack(target: Target, content: bytes) -> bool:
    """Give the reader an input; return whether it was taken.

    Raises:
        AssertionError: it was refused by an error that a terminal should not show.
        Exception: anything but a GraspError is a bug.
    """
    try:
        target.read(content)
    except GraspError as error:
        message = " ".join(str(error).split())
        assert message, "an empty message"
        assert len(message) <= MOST_MESSAGE, f"a message of {len(message)} characters"
        assert not RAW.search(message), f"a raw control character: {message!a}"
        return False
    return True


def random_input(target: Target, rng: random.Random) -> bytes:
    """Spoil one of the target's seeds: in its structure, in its bytes, or in both."""
    content = rng.choice(target.seeds)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        content = target.spoil(content, rng)
    if rng.random() < 0.5:
        content = spoil_bytes(content, rng)
    return content


def spoil_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, repeat, splice, and insert what readers stumble over."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randint(0, len(data))
        stop = min(len(data), at + rng.choice((1, 2, 8, 64, 1000)))
        way = rng.randrange(7)
        if way == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            data[at:at] = rng.choice(TOKENS)
        elif way == 2:
            del data[at:stop]
        elif way == 3:
            data[at:at] = data[at:stop] * rng.choice((1, 2, 10))
        elif way == 4:
            data[at:stop] = rng.randbytes(stop - at)
        elif way == 5 and rng.random() < 0.3:
            del data[at:]
        else:
            other = rng.randint(0, len(data))
            data[at:stop] = data[other : other + stop - at]
    return bytes(data)


def spoil_tree(tree: Any, rng: random.Random) -> Any:
    """Replace, remove, rename, add or wrap one part of nested lists and objects."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places:
        return rng.choice(VALUES)
    place, key = rng.choice(places)
    way = rng.randrange(6)
    if way <= 2:
        place[key] = copy.deepcopy(rng.choice(VALUES))
    elif way == 3:
        del place[key]
    elif way == 4 and isinstance(place, dict):
        place[rng.choice(("r", "id", "", "x\x1b", "bias", "segments", "preset", str(key) + "s"))] = place.pop(key)
    else:
        place[key] = rng.choice(([place[key]], {"text": place[key]}, [place[key]] * 3))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


def targets(folder: Path, model: torch.nn.Module) -> list[Target]:
    """Return all readers with their seeds.

    Args:
        folder: an empty folder for the files.
        model: the tiny Llama, that adapters are checked against.
    """
    result = [_recipes(folder), _overrides(folder)]
    for suffix in ("json", "jsonl", "csv", "tsv", "parquet"):
        for task in ("completion", "qa", "summarization"):
            result.append(_data(folder, suffix, task))
    return result + [_adapter(folder, name, model) for name in (CONFIG_FILE, OUR_FILE, WEIGHTS_FILE)]


def _recipes(folder: Path) -> Target:
    file = folder / "fuzzed.yaml"

    def read(content: bytes) -> object:
        file.write_bytes(content)
        return load_recipe(file)

    def spoil(content: bytes, rng: random.Random) -> bytes:
        return yaml.safe_dump(spoil_tree(yaml.safe_load(content), rng), allow_unicode=True).encode(
            errors="surrogatepass"
        )

    return Target("recipe", (RECIPE.encode(),), read, spoil)


def _overrides(folder: Path) -> Target:
    file = folder / "valid.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    sections = list(yaml.safe_load(RECIPE))

    def spoil(content: bytes, rng: random.Random) -> bytes:
        path = ".".join(
            rng.choice((*sections, "training", "policy", "rank", "", "x\x1b")) for _ in range(rng.randint(1, 4))
        )
        value = yaml.safe_dump(rng.choice(VALUES), default_flow_style=True).removesuffix("\n...\n")
        return f"{path}={value}".encode(errors="surrogatepass")

    def read(content: bytes) -> object:
        return load_recipe(file, [content.decode(errors="replace")])

    return Target("override", (b"lora.rank=4", b"controller.preset=paper", b"metrics=[f1, bleu]"), read, spoil)


def _data(folder: Path, suffix: str, task: str) -> Target:
    file = folder / f"fuzzed.{suffix}"
    trees: list[Any] = list(ROWS.values())
    if suffix == "json":
        trees.append(SQUAD)
    if suffix in ("csv", "tsv"):
        trees = [ROWS["completion"], ROWS["flat qa"], ROWS["xlsum"]]

    def read(content: bytes) -> object:
        file.write_bytes(content)
        return make_pool([read_file(file.name, file)], task)

    def spoil(content: bytes, rng: random.Random) -> bytes:
        return _write(spoil_tree(rng.choice(trees), rng), suffix)

    return Target(f"{suffix} for {task}", tuple(_write(tree, suffix) for tree in trees), read, spoil)


def _write(tree: Any, suffix: str) -> bytes:
    """Write rows as a file of the suffix; what it cannot hold becomes JSON."""
    rows = tree if isinstance(tree, list) else [tree]
    if suffix == "jsonl":
        return "\n".join(json.dumps(row) for row in rows).encode()
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        sink = io.BytesIO()
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
            return sink.getvalue()
        except (pyarrow.ArrowException, AttributeError, TypeError, ValueError, OverflowError, IndexError):
            return b"PAR1" + json.dumps(tree).encode() + b"PAR1"
    if suffix in ("csv", "tsv"):
        separator = "," if suffix == "csv" else "\t"
        columns = [str(key) for key in rows[0]] if rows and isinstance(rows[0], dict) else ["prompt", "completion"]
        cells = [[str(part) for part in row.values()] if isinstance(row, dict) else [str(row)] for row in rows]
        quoted = [[f'"{cell}"' if "\n" in cell else cell for cell in row] for row in [columns, *cells]]
        return "\n".join(separator.join(row) for row in quoted).encode(errors="surrogatepass")
    return json.dumps(tree).encode()


def _adapter(folder: Path, name: str, model: torch.nn.Module) -> Target:
    place = folder / f"adapter-{name.split('.')[0]}"
    place.mkdir()
    ending = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
    generator = torch.Generator().manual_seed(1)
    weights = {
        ending.format(layer, module, factor): torch.randn(shape, generator=generator)
        for layer in (0, 1)
        for module, d_out in (("q_proj", 32), ("v_proj", 16))
        for factor, shape in (("A", (2, 32)), ("B", (d_out, 2)))
    }
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none",
        "rank_pattern": {"^model\\.layers\\.0\\.self_attn\\.q_proj": 2}, "alpha_pattern": {".*v_proj": 8.5},
        "use_rslora": False, "use_dora": False, "base_model_name_or_path": "tiny", "auto_mapping": None,
    }  # fmt: skip
    ours = {
        "backbone_fingerprint": "f",
        "segments": {"model.layers.0.self_attn.q_proj": [["source", 1], ["target", 1]]},
    }
    files = {
        CONFIG_FILE: json.dumps(config).encode(),
        OUR_FILE: json.dumps(ours).encode(),
        WEIGHTS_FILE: save(weights, metadata={"format": "pt"}),
    }
    for each, content in files.items():
        (place / each).write_bytes(content)

    def read(content: bytes) -> object:
        (place / name).write_bytes(content)
        adapter = read_adapter(place)
        for pair in adapter.weights.values():
            assert torch.isfinite(pair.A).all()
            assert torch.isfinite(pair.B).all()
            assert 0 < pair.scaling < math.inf
        check_fits(adapter, model, backbone_name="tiny", fingerprint="f")
        return adapter

    def spoil(content: bytes, rng: random.Random) -> bytes:
        if name != WEIGHTS_FILE:
            return json.dumps(spoil_tree(json.loads(content), rng)).encode()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.dumps(spoil_tree(json.loads(content[8 : 8 + length]), rng)).encode()
        return struct.pack("<Q", len(header)) + header + content[8 + length :]

    return Target(f"adapter: {name}", (files[name],), read, spoil)

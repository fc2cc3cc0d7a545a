"""Random and spoiled inputs: a reader takes them or refuses them with a GraspError, and never anything else.

GRASP_LORA_FUZZ_EXAMPLES sets how many inputs each reader gets.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks import ROWS, Target, attack, random_input, targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("GRASP_LORA_FUZZ_EXAMPLES", "25"))
few = settings(
    max_examples=EXAMPLES, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
)
columns = st.sampled_from(
    ["id", "group", "title", "references", "messages", *ROWS["completion"][0], *ROWS["qa"][0], "text"]
)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory, make_tiny_model: Callable) -> dict[str, Target]:
    found = targets(tmp_path_factory.mktemp("fuzz"), make_tiny_model("llama"))
    return {target.name: target for target in found}


NAMES = [
    "recipe", "override",
    *(f"{suffix} for {task}" for suffix in ("json", "jsonl", "csv", "tsv", "parquet")
      for task in ("completion", "qa", "summarization")),
    "adapter: adapter_config.json", "adapter: grasp_lora.json", "adapter: adapter_model.safetensors",
]  # fmt: skip


def test_each_reader_is_attacked_and_takes_a_valid_input(readers: dict[str, Target]) -> None:
    assert list(readers) == NAMES
    for target in readers.values():
        assert any(attack(target, seed) for seed in target.seeds), target.name


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**64))
@few
def test_spoiled_files(name: str, seed: int, readers: dict[str, Target]) -> None:
    attack(readers[name], random_input(readers[name], random.Random(seed)))


@pytest.mark.parametrize("name", NAMES)
@given(content=st.binary(max_size=200))
@few
def test_any_bytes(name: str, content: bytes, readers: dict[str, Target]) -> None:
    attack(readers[name], content)


@pytest.mark.parametrize("name", ["recipe", "override"])
@given(text=st.text(max_size=200))
@few
def test_any_text(name: str, text: str, readers: dict[str, Target]) -> None:
    attack(readers[name], text.encode(errors="surrogatepass"))


@pytest.mark.parametrize("task", ["completion", "qa", "summarization"])
@given(rows=st.lists(st.dictionaries(columns, values, max_size=6), max_size=4))
@few
def test_any_rows(task: str, rows: list[dict], readers: dict[str, Target]) -> None:
    attack(readers[f"jsonl for {task}"], "\n".join(json.dumps(row) for row in rows).encode())


@given(config=st.dictionaries(st.sampled_from(["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias",
                                               "target_modules", "base_model_name_or_path"]), values))  # fmt: skip
@few
def test_any_config(config: dict, readers: dict[str, Target], tmp_path: Path) -> None:
    target = readers["adapter: adapter_config.json"]
    attack(target, json.dumps(json.loads(target.seeds[0]) | config).encode())

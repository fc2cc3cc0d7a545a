"""What decides the answers to the test prompts: the tokens that end them, too."""

import json
from pathlib import Path

import pytest
from recorder import session_of

from grasp_lora.bench.outcomes import Adapter
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import Store

EOS = 2


@pytest.mark.parametrize(("ends", "extra"), [(EOS, None), ([EOS], None), ([EOS, 5, 9], [5, 9])])
def test_a_further_end_of_the_backbone_is_part_of_the_key(
    tiny_workspace: Path, ends: int | list[int], extra: list[int] | None
) -> None:
    own = Path("own")
    own.mkdir()
    for file in Path("tiny-llama").iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    config = json.loads((own / "generation_config.json").read_text())
    (own / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    usual, other = (session_of(f"backbone.name={name}") for name in ("tiny-llama", "own"))
    keys = [Bench(one, one, Store(Path("store")))._asked(Adapter("adapter", lambda: None)) for one in (usual, other)]
    assert keys[1]["generation"].pop("ends", None) == extra
    assert keys[0] == keys[1]
    assert "ends" not in keys[0]["generation"]

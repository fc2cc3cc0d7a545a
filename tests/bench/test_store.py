"""A step whose adapter was lost: what is left of making it again is gone on from, and goes where it is of no use."""

from pathlib import Path
from typing import Any

import pytest

from grasp_lora.bench.store import Store, key_of

TRAINED = {"trained_examples": 3, "dev_loss": 1.0}


@pytest.mark.parametrize(
    ("step", "result", "adapter", "kept"),
    [
        ("final 0.40", TRAINED, False, True),
        ("final 0.40", TRAINED, True, False),
        ("controller", TRAINED, False, False),  # it keeps no adapter
        ("test losses", {"losses": [1.0]}, False, False),
    ],
)
def test_checkpoints_of_a_killed_second_training_stay_until_it_is_done(
    tmp_path: Path, step: str, result: dict[str, Any], adapter: bool, kept: bool
) -> None:
    settings, key = {"a": 1}, key_of(step, {"a": 1})
    Store(tmp_path).get(step, settings, lambda *_: result)
    left = tmp_path / "work" / key / step.replace(" ", "-") / "of-the-training"
    left.mkdir(parents=True)
    if adapter:
        Store(tmp_path).adapter_folder(key).mkdir(parents=True)
    seen = []

    def again(key: str, folder: Path) -> dict[str, Any]:
        seen.append((folder / left.name).is_dir())
        return result

    store = Store(tmp_path)
    assert store.get(step, settings, again).result == result
    assert left.is_dir() == kept
    store.get(step, settings, again, redo=True)
    assert seen == [kept]
    assert not left.exists()

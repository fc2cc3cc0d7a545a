"""A worker of a Ray cluster by itself, without Ray."""

from pathlib import Path

import pytest

from grasp_lora.cli.on_ray import _work
from grasp_lora.errors import RecipeError


def test_a_worker_that_does_not_see_the_folder_says_so_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"cannot work in \S+elsewhere \(No such file or directory\).* sees"
    ) as caught:
        _work(0, None, tmp_path / "elsewhere", "sweep", {})
    assert "\n" not in str(caught.value)

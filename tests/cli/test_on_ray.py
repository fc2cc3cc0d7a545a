"""A worker of a Ray cluster by itself, without Ray."""

from pathlib import Path

import pytest

from grasp_lora.cli.on_ray import _room, _work
from grasp_lora.errors import RecipeError


def test_a_worker_that_does_not_see_the_folder_says_so_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"cannot work in \S+elsewhere \(No such file or directory\).* sees"
    ) as caught:
        _work(0, None, tmp_path / "elsewhere", {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("gpus", "each", "workers"), [(1.0, 0.2, 5), (1.0, 0.1, 10), (0.6, 0.2, 3), (2.0, 0.4, 5), (3.0, 1.0, 3)]
)
def test_shares_of_a_gpu_are_counted_as_ray_does(gpus: float, each: float, workers: int) -> None:
    nodes = [{"CPU": 2.0 * workers, "GPU": gpus}]
    assert _room(nodes, workers, each) == 2
    with pytest.raises(RecipeError, match=f"--workers is {workers + 1}, but the Ray cluster has room for {workers}:"):
        _room(nodes, workers + 1, each)

"""What completion in a notebook offers of the package."""

import subprocess
import sys

import grasp_lora as gl


def test_dir_names_what_is_public_and_nothing_of_the_machinery() -> None:
    offered = [name for name in dir(gl) if not name.startswith("__")]
    assert offered == sorted(gl.__all__)
    assert {"__doc__", "__version__"} <= set(dir(gl))


def test_dir_loads_nothing() -> None:
    code = "import sys, grasp_lora; dir(grasp_lora); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The page that `make gpu` writes, and the operations that masks take; neither needs a GPU."""

import subprocess
import sys

import gpu
import mask_cost


def test_without_a_gpu_the_command_skips_in_one_line_and_writes_nothing(tmp_path):
    page = tmp_path / "gpu.md"
    done = subprocess.run(
        [sys.executable, gpu.__file__, "--page", str(page)],
        capture_output=True,
        text=True,
        check=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout == "skipped: there is no CUDA GPU here\n"
    assert not page.exists()


def test_the_page_holds_tables_and_failures():
    parts = gpu.parts_of("demo-ar", ["data.root=x"])
    assert parts["Tests"][:5] == ["-m", "pytest", "-q", "-m", "gpu"]
    place = parts["Speed"].index("--set")
    assert parts["Speed"][place + 1] == "data.root=x"
    page = gpu.page_of(
        "a card",
        {
            "Tests": (parts["Tests"], 0, "....\n7 passed in 9.1s\n", 9.4),
            "Speed": (parts["Speed"], 0, "| part | what |\n|---|---|\n| step | 1.2 |\n", 20.0),
            "Memory": (parts["Memory"], 3, "Traceback\nMemoryError: too much\n\n", 1.0),
        },
    )
    assert "- Card: a card" in page
    assert "`7 passed in 9.1s`" in page
    assert "\n| step | 1.2 |\n" in page
    assert "Failed with status 3: `MemoryError: too much`" in page
    assert "It took 20 s." in page


def test_the_operations_of_masks_grow_no_faster_than_the_layers(capsys):
    def operations(layers: int) -> dict[str, int]:
        mask_cost.main(["--layers", str(layers), "--width", "8", "--outputs", "6,4", "--rank", "2", "--device", "cpu"])
        cells = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
        return {name.strip(" `"): int(count) for _, name, count, *_ in cells}

    few, many = operations(1), operations(5)
    for name in ("commit", "mask_gradients", "enforce", "probe", "rank"):
        assert 0 < few[name] <= many[name] <= 5 * few[name]

import importlib.util
import json
import shutil
import struct
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "docs" / "draw_pictures.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_pictures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawings_are_what_the_script_draws(script: ModuleType) -> None:
    for name, draw in script.PICTURES.items():
        shown = (script.IMAGES / name).read_text(encoding="utf-8")
        assert shown == draw(), f"run python docs/draw_pictures.py: {name} is another one"


def test_the_picture_of_a_report_leaves_out_what_is_another_at_each_run(
    script: ModuleType, reference_run: Path
) -> None:
    report = (reference_run / "report.html").read_text(encoding="utf-8")
    made = json.loads((reference_run / "run.json").read_text(encoding="utf-8"))
    for varying in (made["created"][:10], f"torch {made['libraries']['torch']}"):
        assert varying in report
        assert varying not in script.steady(report)


@pytest.mark.slow
def test_the_picture_of_a_report_is_taken(script: ModuleType, reference_run: Path, tmp_path: Path) -> None:
    if not any(map(shutil.which, script.BROWSERS)):
        pytest.skip("needs Chromium")
    picture = tmp_path / "report.png"
    script.take_report(reference_run, picture)
    content = picture.read_bytes()
    assert struct.unpack(">II", content[16:24]) == script.SIZE
    assert len(content) > 50_000  # not an empty page


def test_without_a_browser_the_script_says_which_it_looks_for(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="chromium"):
        script.take_report(tmp_path, tmp_path / "report.png")

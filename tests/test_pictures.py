import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "docs" / "draw_pictures.py"


def test_the_drawings_are_what_the_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("draw_pictures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, draw in script.PICTURES.items():
        shown = (script.IMAGES / name).read_text(encoding="utf-8")
        assert shown == draw(), f"run python docs/draw_pictures.py: {name} is another one"

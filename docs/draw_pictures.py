"""Draws docs/images/round.svg (one round) and docs/images/regimes.svg (Held and EachStep): `python docs/draw_pictures.py`.

With the folder of a run, as `grasp-lora demo` leaves it, it takes the README's picture of a report, docs/images/report.png, too:
`python docs/draw_pictures.py runs/demo-ar`. That needs Chromium.
"""

import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from xml.sax.saxutils import escape

IMAGES = Path(__file__).parent / "images"
INK, QUIET, BLUE, ORANGE, PALE = "#1f2933", "#616e7c", "#1f5fa8", "#c2571a", "#eef3f9"
GOLDEN = (math.sqrt(5) - 1) / 2  # as `spread` takes its ratios: any stretch of steps covers the range evenly
LOW, HIGH = 0.1, 0.8  # bounds of the ratio, the paper's


def text(x: float, y: float, words: str, size: int = 13, color: str = INK, anchor: str = "middle") -> str:
    """One line of text."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}">{escape(words)}</text>'


def line(points: Iterable[tuple[float, float]], color: str = INK, width: float = 1.5, extra: str = "") -> str:
    """A line through points."""
    through = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{through}" fill="none" stroke="{color}" stroke-width="{width:g}" {extra}/>'


def arrow(points: list[tuple[float, float]], color: str = INK) -> str:
    """A line that ends in an arrow head; its last part is horizontal or vertical."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    head = [(x, y), (x - 8 * dx + 4 * dy, y - 8 * dy + 4 * dx), (x - 8 * dx - 4 * dy, y - 8 * dy - 4 * dx)]
    corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in head)
    return line(points, color) + f'<polygon points="{corners}" fill="{color}"/>'


def box(x: float, y: float, title: str, lines: list[str], color: str = BLUE, width: float = 186) -> str:
    """A box with a title and lines under it."""
    height = 34 + 18 * len(lines)
    frame = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height}" rx="6" fill="{PALE}" stroke="{color}"/>'
    rows = [text(x + width / 2, y + 44 + 18 * number, words, 12) for number, words in enumerate(lines)]
    return frame + text(x + width / 2, y + 22, title, 14, color) + "".join(rows)


def page(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """The whole picture on a white ground, so that it can be read on a dark page, too."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="Helvetica, Arial, sans-serif" role="img"><title>{escape(title)}</title>'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    )
    return head + "\n" + "\n".join(parts) + "\n</svg>\n"


def draw_round() -> str:
    """What happens between two optimizer steps when a round is due."""
    columns = [20, 224, 428, 632]
    steps = [
        ("1. baseline", ["the ratio in force", "on all probed examples"], BLUE),
        ("2. candidates", ["mask on, loss of a few", "examples, mask off again"], BLUE),
        ("3. tell", ["the policy hears all losses:", "reward = baseline - candidate"], ORANGE),
        ("4. commit", ["the policy moves its ratio,", "or leaves it where it is"], ORANGE),
    ]
    parts = [
        text(20, 28, "optimizer steps with the mask on", 13, QUIET, "start"),
        arrow([(20, 40), (818, 40)], QUIET),
        *(line([(x, 35), (x, 45)], QUIET) for x in range(40, 800, 19)),
        arrow([(113, 40), (113, 78)]),
    ]
    parts += [box(x, 80, title, lines, color) for x, (title, lines, color) in zip(columns, steps, strict=True)]
    parts += [arrow([(x + 186, 115), (x + 204, 115)]) for x in columns[:3]]
    parts += [
        arrow([(725, 78), (725, 46)]),
        text(733, 68, "go on", 12, QUIET, "start"),
        arrow([(725, 150), (725, 178)]),
        box(632, 180, "5. stop?", ["no lower loss at any ratio", "for as long as patience says"], ORANGE),
        arrow([(630, 215), (612, 215)]),
        box(
            224,
            180,
            "learned ratio, with an interval",
            ["the rule reads all rounds:", "where is the loss lowest?"],
            BLUE,
            388,
        ),
    ]
    return page(838, 268, "One round of the controller", parts)


def draw_regimes() -> str:
    """The prune ratio at which each step trains, in both regimes."""
    return page(838, 290, "The two regimes: Held and EachStep", [*_panel(20, _held), *_panel(434, _each_step)])


def _panel(left: float, fill: Callable[[Callable[[float, float], tuple[float, float]]], list[str]]) -> list[str]:
    """Axes of one regime, and what `fill` draws in them, given where (step, ratio) lies."""

    def place(step: float, ratio: float) -> tuple[float, float]:
        return left + 44 + step * 8.2, 235 - ratio * 200

    axes = [
        line([place(0, 0.85), place(0, 0), place(40.5, 0)], QUIET),
        *(
            text(place(0, ratio)[0] - 8, place(0, ratio)[1] + 4, f"{ratio:g}", 11, QUIET, "end")
            for ratio in (LOW, HIGH)
        ),
        *(line([place(0, ratio), place(40, ratio)], "#d5dbe2", 1) for ratio in (LOW, HIGH)),
        text(place(20, 0)[0], 256, "optimizer steps", 12, QUIET),
        text(left, 50, "ratio", 11, QUIET, "start"),
    ]
    return axes + fill(place)


def _held(place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    committed, candidates = [0.4, 0.5, 0.5, 0.6], [(0.52, 0.3, 0.45), (0.36, 0.58, 0.41), (0.5, 0.74, 0.62)]
    path = [
        point for at, ratio in enumerate(committed) for point in (place(10 * at, ratio), place(10 * at + 10, ratio))
    ]
    parts = [line(path, BLUE, 2.5)]
    for number, ratios in enumerate(candidates, start=1):
        parts += [_dot(*place(10 * number, ratio), ORANGE, 3.5) for ratio in ratios]
    middle = place(20, 0)[0]
    return [
        *parts,
        text(middle, 24, "Held (preset paper)", 15),
        text(middle, 278, "one ratio is in force; a round may move it", 12),
    ]


def _each_step(place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    ratios = [LOW + (HIGH - LOW) * ((0.5 + step * GOLDEN) % 1.0) for step in range(40)]
    parts = [_dot(*place(step + 0.5, ratio), BLUE, 2.2) for step, ratio in enumerate(ratios)]
    for step, candidates in ((0, (0.4, 0.17, 0.6)), (20, (0.4, 0.28, 0.71)), (40, (0.28, 0.5, 0.38))):
        parts += [_dot(*place(step, ratio), ORANGE, 3.5) for ratio in candidates]
    middle = place(20, 0)[0]
    return [
        *parts,
        text(middle, 24, "EachStep (presets spread and late)", 15),
        text(middle, 278, "each step trains at a ratio of its own; none is favoured", 12),
    ]


def _dot(x: float, y: float, color: str, radius: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{color}"/>'


PICTURES = {"round.svg": draw_round, "regimes.svg": draw_regimes}

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIZE = (1100, 2080)  # pixels
ALONE = [  # nothing of the user's, and nothing from the network
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--hide-scrollbars",
]  # fmt: skip


def steady(report: str) -> str:
    """A report without what is another at each run: its date, and the versions that made it."""
    return re.sub(r"<dt>(Date|Versions)</dt>\s*<dd>.*?</dd>", "", report, flags=re.DOTALL)


def take_report(run: Path, picture: Path) -> None:
    """Take a picture of the upper part of a run's report, in the light theme."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no browser is there; install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_text(steady((run / "report.html").read_text(encoding="utf-8")), encoding="utf-8")
        shot = [f"--window-size={SIZE[0]},{SIZE[1]}", f"--user-data-dir={folder}/profile", f"--screenshot={picture}"]
        subprocess.run([browser, *ALONE, *shot, page.as_uri()], check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (IMAGES / name).write_text(draw(), encoding="utf-8")
    for run in sys.argv[1:2]:
        take_report(Path(run), IMAGES / "report.png")

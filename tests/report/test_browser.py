"""The pages in a real browser: nothing wider than a phone, every plot drawn, right to left where the text is."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from made_runs import SYSTEMS, answered, fixture_run, fixture_whole_run  # noqa: F401

from grasp_lora.engine.run_folder import Run
from grasp_lora.report.pages import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (390, 1280)
TEXTS = {
    "ar": ("اقرأ النص ثم أجب.\nمن افتتح المكتبة؟", "افتتحها الشيخ سالم قبل ست سنوات"),
    "zh": ("阅读短文并回答问题。\n图书馆是谁开的？", "六年前由一位老教师开办的图书馆"),
}
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--allow-file-access-from-files", "--virtual-time-budget=20000", "--dump-dom",
)  # fmt: skip
HARNESS = """<!doctype html><meta charset="utf-8"><body><script>
const seen = (element) => element.checkVisibility();
function measure(frame) {
  const page = frame.contentDocument, style = (element) => frame.contentWindow.getComputedStyle(element);
  return {
    page: frame.dataset.page, width: frame.contentWindow.innerWidth, scrollWidth: page.documentElement.scrollWidth,
    directions: [...new Set([...page.querySelectorAll(".example .text")].filter(seen).map((one) => style(one).direction))],
    tables: [...page.querySelectorAll(".scroll")].filter(seen).length,
    plots: [...page.querySelectorAll(".plot")].map((one) => {
      const drawn = one.querySelector(".main-svg");
      return drawn !== null && drawn.getBoundingClientRect().width <= one.clientWidth + 1;
    }),
    colors: [style(page.body).color, style(page.body).backgroundColor],
  };
}
const frames = PAGES.flatMap((page) => WIDTHS.map((width) => {
  const frame = document.createElement("iframe");
  Object.assign(frame, { width, height: 800, src: page });
  frame.dataset.page = page;
  return frame;
}));
Promise.all(frames.map((frame) => new Promise((done) => { frame.onload = done; document.body.append(frame); })))
  .then(() => setTimeout(() => {
    const found = document.createElement("pre");
    found.textContent = JSON.stringify(frames.map(measure));
    document.body.append(found);
  }, 1000));
</script>"""


def measured(folder: Path, pages: list[str], *flags: str) -> list[dict[str, Any]]:
    """What a browser finds in each page at each width."""
    assert CHROMIUM is not None
    harness = folder / "harness.html"
    harness.write_text(HARNESS.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS)), "utf-8")
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", harness.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    found = re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(unescape(found[1]))
    return rows


@pytest.fixture
def pages(run: Run, tmp_path: Path) -> list[str]:
    """The reports of a run in Arabic and of one in Chinese, by paths from `tmp_path`."""
    for language, (prompt, answer) in TEXTS.items():
        for name in SYSTEMS:
            run = answered(run, name, lambda place, answer=answer: {"prediction": answer, "references": (answer,)})
        (tmp_path / language).mkdir()
        write_report(replace(run, prompts=[prompt] * 8), tmp_path / language)
    return [f"{name}/report.html" for name in TEXTS]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_pages_fit_a_phone_and_a_desk_in_light_and_dark(pages: list[str], tmp_path: Path) -> None:
    light = measured(tmp_path, pages)
    dark = measured(tmp_path, pages[:1], "--blink-settings=preferredColorScheme=0")
    assert [(row["page"], row["width"]) for row in light] == [(page, width) for page in pages for width in WIDTHS]
    for row in (*light, *dark):
        assert row["scrollWidth"] <= row["width"], row
        assert row["plots"]
        assert all(row["plots"])
        assert row["tables"]
        language = row["page"].partition("/")[0]
        assert row["directions"] == {"ar": ["rtl"], "zh": ["ltr"]}[language]
    brightness = [
        [sum(map(int, re.findall(r"\d+", color)[:3])) for color in rows[0]["colors"]] for rows in (light, dark)
    ]
    (ink, paper), (dark_ink, dark_paper) = brightness
    assert paper - ink > 400
    assert dark_ink - dark_paper > 400

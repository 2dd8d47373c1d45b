"""The report in a real browser, on a desk and on a phone: legible, nothing on top of another, no error."""

import itertools
import math
import random
import re
import shutil
import subprocess
from html import unescape

import pytest
import torch

from syncbn.trainer.report.page import runs_page, sweep_page
from syncbn.trainer.runs import sweep_folder
from syncbn.trainer.runs.pictures import PNG, Box
from syncbn.trainer.runs.reader import read_runs
from syncbn.trainer.tasks import Picture
from tests.trainer.made_runs import DEAD, SHARDS, make_detection, make_run, make_segmentation

PROBE = """
<iframe id="page" src="{page}" style="width: {width}px; height: 800px; border: 0"></iframe><pre id="told"></pre>
<script>
onload = () => {{
  const inner = document.getElementById("page").contentDocument
  const before = (a, b) => a.right <= b.left + 1 || a.bottom <= b.top + 2
  const problems = []
  for (const image of inner.images) {{
    const {{left, right}} = image.getBoundingClientRect()
    if (left < 0 || right > {width} || right - left < 100) problems.push(`picture: ${{left}} to ${{right}}`)
  }}
  if (inner.documentElement.scrollWidth > {width}) problems.push("wide: " + inner.documentElement.scrollWidth)
  for (const svg of inner.querySelectorAll("svg")) {{
    const frame = svg.getBoundingClientRect()
    const scale = frame.width / svg.viewBox.baseVal.width
    const px = element => scale * parseFloat(getComputedStyle(element).fontSize)
    const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect(), px(t)])
    texts.forEach(([name, box, size], i) => {{
      if (!(size >= 8.5)) problems.push(`small: ${{name}} ${{size}}`)
      if (box.left < frame.left - 1 || box.right > frame.right + 1) problems.push("outside: " + name)
      for (const [other, its] of texts.slice(i + 1))
        if (!before(box, its) && !before(its, box)) problems.push(`overlap: ${{name}} | ${{other}}`)
    }})
  }}
  for (const panel of inner.querySelectorAll(".under")) {{
    const frame = panel.getBoundingClientRect()
    if (frame.left < 0 || frame.right > {width} || frame.width < 150 || frame.height < 100) problems.push("panel")
    const labels = [...panel.querySelectorAll("b")].map(b => [b, b.getBoundingClientRect()])
    labels.forEach(([b, box], i) => {{
      const name = b.textContent
      if (!(parseFloat(getComputedStyle(b).fontSize) >= 8.5)) problems.push("small: " + name)
      if (b.scrollWidth > b.clientWidth) problems.push("cut off: " + name)
      const beside = box.left < frame.left - 3 || box.right > frame.right + 1
      if (beside || box.top < frame.top - 3 || box.bottom > frame.bottom)
        problems.push("outside: " + name)
      for (const [other, its] of labels.slice(i + 1))
        if (!before(box, its) && !before(its, box)) problems.push(`overlap: ${{name}} | ${{other.textContent}}`)
    }})
  }}
  if (inner.querySelectorAll("svg text").length < 20) problems.push("figures without text")
  document.getElementById("told").textContent = problems.join("\\n")
}}
</script>
"""


BOXED = {"scenes with boxes": (64, 90), "photographs with boxes": (480, 640)}  # height and width
CLASSES = {"2 classes": 2, "11 classes": 11, "19 classes": 19, "150 classes": 150}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium on the PATH")
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("kind", ["one", "many layers", "three", "sweep", *CLASSES, *BOXED])
def test_a_browser_shows_it_legibly(tmp_path, width, kind):
    long = "digits-resnet8-local-b2-optim.lr_0.4-train.ema_0.999-data.workers_4-" + 60 * "x"
    if kind == "sweep":
        (tmp_path / "page.html").write_text(sweep_page(long, wide_sweep()))
        look_at(tmp_path, width)
        return
    if kind in CLASSES:
        names = [f"{'a long name of a class ' if i % 7 == 0 else 'class_'}{i}" for i in range(CLASSES[kind])]
        folders = [make_segmentation(tmp_path / "a", names, absent=names[1:2], size=(360, 480))]
    elif kind in BOXED:
        folders = [many_boxes(tmp_path / "a", *BOXED[kind])]
    elif kind == "three":
        folders = [make_run(tmp_path / name, verdicts=[SHARDS, DEAD], logs=300) for name in ("a", "b", long)]
    else:
        size = {"layers": 160, "logs": 1000, "ranks": 128} if kind == "many layers" else {"verdicts": [SHARDS, DEAD]}
        folders = [make_run(tmp_path / long, **size)]
    (tmp_path / "page.html").write_text(runs_page(read_runs(folders)))
    look_at(tmp_path, width)


def many_boxes(path, height, width):
    """A run of 80 classes with four pictures, of 24 boxes and more."""
    draw, names = random.Random(0), [f"{'a long name ' if i % 7 == 0 else 'MWM'}{i}" for i in range(80)]

    def boxes(score):
        for _ in range(24):
            wide, high = (side * draw.uniform(0.05, 0.4) for side in (width, height))
            left, top = draw.uniform(0, width - wide), draw.uniform(0, height - high)
            yield Box(left, top, left + wide, top + high, draw.choice(names), score and draw.random())

    png = Picture(torch.full((3, height, width), 120, dtype=torch.uint8)).png()
    pictures = [PNG(png, "1 of 9 found", (), {"truth": [*boxes(None)], "prediction": [*boxes(1)]}) for _ in range(4)]
    return make_detection(path, pictures, names, dict.fromkeys(names, "#e64b35"))


def wide_sweep():
    """Points of many numbers and long words, some refused."""
    keys = {"model.name": ["resnet20", "my_package.nets:a_builder_of_a_long_name"], "optim.lr": ["0.01", "0.1", "1"]}
    every = itertools.product(*keys.values(), ["1", "2", "4", "8", "32"], ["0", "1"])
    made = [
        sweep_folder.Point(
            dict(zip([*keys, "data.batch_per_rank", "seed"], values, strict=True)),
            run=f"run{i}",
            state="refused" if i % 7 == 0 else "finished",
            reason=60 * "norm=torch " if i % 7 == 0 else "",
            objective=None if i % 7 == 0 else 0.5 + 0.3 * math.sin(i),
        )
        for i, values in enumerate(every)
    ]
    return sweep_folder.Sweep([*keys, "data.batch_per_rank", "seed"], len(made), "accuracy", 0.0, made)


def look_at(tmp_path, width):
    (tmp_path / "probe.html").write_text(PROBE.format(page="page.html", width=width))
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    probe = [*browser, "--allow-file-access-from-files", "--enable-logging=stderr", "--window-size=1400,900"]
    done = subprocess.run(
        [*probe, "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/probe.html"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    assert unescape(re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)[1]) == ""

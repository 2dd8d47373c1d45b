"""The report of runs: all that their folders tell, in one file that needs nothing else."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from base64 import b64encode
from html import unescape
from html.parser import HTMLParser

import pytest
import torch

from syncbn.trainer.report.page import main, runs_page
from syncbn.trainer.runs.pictures import PNG, Box, Pictures, write_pictures
from syncbn.trainer.runs.reader import read_runs
from syncbn.trainer.tasks import Picture
from tests.trainer.made_runs import DEAD, SHARDS, make_detection, make_run, make_segmentation, rewrite


def page(*folders):
    return runs_page(read_runs(folders))


def text_of(html):
    """What a reader sees, tags and figures left out."""
    bare = re.sub(r"<(style|svg)\b.*?</\1>", " ", html, flags=re.S)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", bare)))


AWKWARD = {
    "whole": lambda p: make_run(p, verdicts=[SHARDS, DEAD]),
    "no drift": lambda p: make_run(p, drift=False),
    "unfinished": lambda p: make_run(p, finished=False, verdicts=[DEAD]),
    "no line yet": lambda p: make_run(p, logs=0, finished=False),
    "one line": lambda p: make_run(p, logs=1),
    "one layer": lambda p: make_run(p, layers=1),
    "one rank": lambda p: make_run(p, ranks=1),
    "53 layers": lambda p: make_run(p, layers=53, logs=1000),
    "160 layers, 300 ranks": lambda p: make_run(p, layers=160, logs=20, ranks=300),
    "metrics gone": lambda p: (make_run(p) / "metrics.jsonl").unlink(),
    "cut line": lambda p: rewrite(make_run(p) / "metrics.jsonl", lambda text: text[:-40]),
    "nan and inf": lambda p: rewrite(
        make_run(p) / "metrics.jsonl", lambda text: re.sub(r'("(train/loss|drift/bn1/icc)": )[^,]*', r"\1NaN", text)
    ),
    "all inf": lambda p: rewrite(
        make_run(p) / "metrics.jsonl", lambda text: re.sub(r'("(\w+/loss|drift/\S*)": )[\d.e-]+', r"\1Infinity", text)
    ),
    "damaged result": lambda p: (make_run(p) / "result.json").write_text('{"objective": 0.'),
    "bytes that are no text": lambda p: (make_run(p) / "metrics.jsonl").write_bytes(b"\xff\xfe\x00{}\n"),
    "alien config": lambda p: (make_run(p) / "config.yaml").write_text("other: {key: [1, 2]}"),
}


COLOURS = {"<cat>": "#112233", "dog": "#ffee00"}
LARGE = ("53 layers", "160 layers, 300 ranks")


@pytest.fixture(
    params=[pytest.param(make, marks=pytest.mark.slow if name in LARGE else ()) for name, make in AWKWARD.items()],
    ids=AWKWARD,
)
def awkward(request, tmp_path):
    request.param(tmp_path / "run")
    return tmp_path / "run"


class Balanced(HTMLParser):
    """Fails for a tag that is closed twice, too early or never, and keeps ids and references."""

    VOID = ("meta", "br", "img")

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.attributes, self.text = [], [], [], set(), set(), ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {key for key, _ in attrs}
        self.ids += [value for key, value in attrs if key == "id"]
        self.links += [
            value for key, value in attrs if key in ("src", "href", "xlink:href", "action", "srcset", "data")
        ]

    def handle_data(self, data):
        self.text += data

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_every_run_has_a_page_that_needs_nothing_else(awkward):
    html = page(awkward)
    parsed = Balanced(html)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert {link.lstrip("#") for link in parsed.links if link.startswith("#")} <= set(parsed.ids)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in parsed.links)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "@import" not in html
    assert not parsed.tags & {"script", "link", "iframe", "object", "base"}
    assert "default-src 'none'" in html
    assert len(html) < 1e6
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        ET.fromstring(svg)


def test_what_a_run_was_stands_at_its_head(tmp_path):
    make_run(tmp_path / "digits-resnet8", config={"norm.name": "local", "data.batch_per_rank": 2}, ranks=4)
    text = text_of(page(tmp_path / "digits-resnet8")).partition("Verdicts")[0]
    for fact in (
        "digits-resnet8",
        "norm local",
        "ranks × images 4 × 2",
        "eval accuracy 93.63%",
        "steps 600",
        "time 62 s",
    ):
        assert fact in text


def test_verdicts_stand_in_order_of_weight_with_their_steps(tmp_path):
    many = [{**SHARDS, "text": f"verdict {i}", "first_step": i, "last_step": 2 * i} for i in (7, 3, 9, 1)]
    make_run(tmp_path / "a", verdicts=many)
    text = text_of(page(tmp_path / "a"))
    assert re.findall(r"verdict \d steps? [\d to]+\d", text) == [
        "verdict 7 steps 7 to 14",
        "verdict 3 steps 3 to 6",
        "verdict 9 steps 9 to 18",
        "verdict 1 steps 1 to 2",
    ]


@pytest.mark.parametrize(
    ("drift", "words"),
    [(True, "ok: no drift seen"), (False, "drift was not measured")],
    ids=["measured", "not measured"],
)
def test_no_verdict_is_told_apart_from_no_measurement(tmp_path, drift, words):
    for finished in True, False:
        make_run(tmp_path / f"{finished}", drift=drift, finished=finished)
        assert words in text_of(page(tmp_path / f"{finished}"))


def test_a_run_without_a_result_is_shown_as_unfinished(tmp_path):
    text = text_of(page(make_run(tmp_path / "a", finished=False)))
    assert "state unfinished" in text
    assert "steps 600" in text
    assert "unfinished" not in text_of(page(make_run(tmp_path / "b")))


def test_the_worst_layers_begin_with_those_that_a_verdict_names(tmp_path):
    make_run(tmp_path / "a", verdicts=[SHARDS, DEAD])
    table = re.search(r"The worst layers.*?</table>", page(tmp_path / "a"), re.S)[0]
    layers = re.findall(r"<tr><th>([^<]*)", table)
    assert layers[:5] == ["layer", "layer2.0.bn1", "layer1.0.bn2", "layer2.1.bn1", "layer2.0.bn2"]
    assert "12 of 20 layers, those named in a verdict first, then by ICC" in page(tmp_path / "a")
    assert "rank 3: " in table


def test_without_icc_the_report_shows_f(tmp_path):
    folder = make_run(tmp_path / "a")
    rewrite(folder / "metrics.jsonl", lambda text: re.sub(r'"drift/\S*/icc": [^,]*, ', "", text))
    html = page(folder)
    assert "Variance between ranks over variance within" in html
    assert "20 layers, by F." in html


def test_what_a_user_wrote_is_text(tmp_path):
    evil = "<script>alert(1)</script>"
    folders = [
        make_run(
            tmp_path / name,
            verdicts=[{**SHARDS, "text": evil}],
            config={"data.root": f"{name}{evil}", "model.name": '"><b onclick="x">'},
        )
        for name in ("<script>$a_{<", "b & 'c' $")
    ]
    for html in page(folders[0]), page(*folders):
        parsed = Balanced(html)
        assert not parsed.tags & {"script"}
        assert "onclick" not in parsed.attributes
        for written in "<script>$a_{<", evil, '"><b onclick="x">':
            assert written in parsed.text


def test_runs_stand_side_by_side_with_the_best_in_bold(tmp_path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", drift=False, seed=1, logs=30)]
    rewrite(folders[1] / "metrics.jsonl", lambda text: re.sub(r'("eval/accuracy": )[\d.]+', r"\g<1>0.5", text))
    html = page(*folders)
    assert '<th>eval accuracy</th><td class="best">93.63%</td><td>50.00%</td>' in html
    assert "<th>steps</th><td>600</td><td>300</td>" in html
    assert "<th>eval recalibrated accuracy</th><td>94.63%</td><td>–</td>" in html
    assert text_of(html).count("drift was not measured") == 1


def test_the_heat_maps_of_several_runs_have_one_scale_of_colours(tmp_path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]
    rewrite(folders[0] / "metrics.jsonl", lambda text: re.sub(r'("drift/bn1/icc": )[^,]*', r"\g<1>0.8", text))
    maps = page(*folders).partition("<h3>ICC</h3>")[2].partition("<h3>")[0]
    assert [svg.count("0.8</text>") for svg in re.findall(r"<svg.*?</svg>", maps, re.S)] == [1, 1]


@pytest.mark.slow
def test_the_command_says_where_the_report_is(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "a", "b":
        make_run(tmp_path / "runs" / name, logs=10)
    for arguments, written in (
        (["runs/a"], "runs/a/report.html"),
        (["runs/a", "runs/b"], "report.html"),
        (["runs/a", "-o", "x.html"], "x.html"),
        (["runs/a", "runs/a/"], "runs/a/report.html"),
    ):
        assert main(arguments) == 0
        assert capsys.readouterr().out == written + "\n"
        assert (tmp_path / written).read_text().startswith("<!DOCTYPE html>")
        (tmp_path / written).unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder; give the folders of runs, such as runs/NAME"),
        (["empty"], "empty is no run (it has no config.yaml): give folders of runs"),
        (["runs"], "runs is no run (it has no config.yaml): give those in it, such as runs/a"),
        (["runs/a/config.yaml"], "runs/a/config.yaml is a file: give the run's folder, runs/a"),
        (["runs/damaged"], "runs/damaged/config.yaml is no config: the file is damaged, leave this run out"),
        (["runs/a", "nowhere"], "nowhere: no such folder; give the folders of runs, such as runs/NAME"),
        (
            ["runs/a", "-o", "no/x.html"],
            "no/x.html cannot be written (No such file or directory): give another file with -o",
        ),
        (["runs/a", "-o", "empty"], "empty cannot be written (Is a directory): give another file with -o"),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "runs" / "a", logs=2)
    (make_run(tmp_path / "runs" / "damaged", logs=2) / "config.yaml").write_text("a: [")
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.slow
def test_another_process_gives_the_same_bytes_and_no_traceback(tmp_path):
    def command(folder):
        line = [sys.executable, "-m", "syncbn.trainer.report", str(folder)]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    done = command(make_run(tmp_path / "a", verdicts=[SHARDS, DEAD]))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/a/report.html\n", "")
    assert (tmp_path / "a" / "report.html").read_text() == page(tmp_path / "a")
    done = command(tmp_path)
    assert done.returncode == 2
    assert re.fullmatch("error: .*\n", done.stderr)


def test_the_pictures_of_a_run_are_on_its_page(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    png = Picture(torch.zeros(3, 4, 6, dtype=torch.uint8)).png()
    write_pictures(a / "pictures", Pictures(1200, [PNG(png, "<cat>"), PNG(png, "dog, taken for cow (93%)")]))
    html = page(a)
    assert re.findall(r'<img src="data:image/png;base64,([^"]*)"', html) == [b64encode(png).decode()] * 2
    assert "step 1,200 <cat> dog, taken for cow (93%)" in text_of(html)
    assert "a, step 1,200" in text_of(page(a, b))
    assert "<img" not in page(b)


def test_pictures_have_their_panels_named_a_legend_and_charts(tmp_path):
    html = page(make_segmentation(tmp_path / "a", ["sky", "<road>"]))
    assert Balanced(html).open == []
    text = text_of(html)
    assert "step 600 sky <road> image truth prediction 90% of the pixels right image" in text
    assert re.findall(r'<i style="background: (#\w+)"></i>(.*?)</li>', html) == [
        ("#000000", "sky"),
        ("#010101", "&lt;road&gt;"),
    ]
    assert "Of each class&#39;s pixels." in html
    assert {*re.findall(r">([^<>]*)</text>", html)} >= {"confusion, %", "prediction", "truth", "&lt;road&gt;"}


def boxed(tmp_path, size=(64, 64), legend=COLOURS, **boxes):
    """The page of a run with a picture that has these boxes."""
    png = Picture(torch.zeros(3, *size, dtype=torch.uint8)).png()
    picture = PNG(png, "2 of 3 found", (), boxes)
    return page(make_detection(tmp_path / "a", [picture, picture], [*COLOURS], legend)), b64encode(png).decode()


def outlines(html):
    """Style, title and label of each box on a page."""
    return re.findall(r'<i style="(left[^"]*)" title="([^"]*)">(?:<b[^>]*>([^<]*)</b>)?</i>', html)


def test_boxes_are_drawn_over_one_picture_in_a_panel_for_each_name(tmp_path):
    cat, dog = Box(32, 32, 96, 64, "<cat>"), Box(1, 0, 128, 40, "dog", 0.97)
    html, data = boxed(tmp_path, (64, 128), truth=[cat], prediction=[dog, Box(9, 9, 64, 64, "dog", 0.49)])
    assert Balanced(html).open == []
    assert "truth &lt;cat&gt; prediction: 1 of 2 dog 97% 2 of 3 found" in text_of(html).replace("<cat>", "&lt;cat&gt;")
    assert html.count(data) == 2  # once for each of the two pictures
    assert re.findall('<image id="(.*?)"', html) == re.findall('<use href="#(.*?)"', html)
    assert len({*re.findall('<image id="(.*?)"', html)}) == 2
    (truth, *_), (guess, *_) = outlines(html)[:2]
    assert truth == "left: 25.00%; top: 50.00%; width: 50.00%; height: 50.00%; --colour: #112233; --ink: #ffffff"
    assert guess == "left: 0.78%; top: 0.00%; width: 99.22%; height: 62.50%; --colour: #ffee00; --ink: #16191c"
    assert [title for _, title, _ in outlines(html)] == 2 * ["&lt;cat&gt;", "dog 97%"]
    assert "Boxes with a score below 50% are not drawn." in html
    assert "are not drawn" not in boxed(tmp_path / "b", truth=[cat])[0]


def test_labels_are_written_where_there_is_room(tmp_path):
    # 640 pixels across are shown in 290, and a label is 16 high: above the first of equal boxes, in the second
    large = Box(100, 100, 400, 400, "dog", 0.9)
    narrow, tiny = Box(450, 100, 499, 400, "dog", 0.6), Box(500, 420, 530, 430, "dog", 0.6)
    boxes = [large, large._replace(score=0.8), large._replace(score=0.7), narrow, tiny, Box(0, 0, 70, 99, "dog", 0.5)]
    html, _ = boxed(tmp_path, (480, 640), prediction=boxes)
    assert sorted(label for *_, label in outlines(html)[:6]) == ["", "dog", "dog 60%", "dog 60%", "dog 80%", "dog 90%"]
    assert html.count('<b class="above">') == 2 * 3
    crowd = [Box(100 + i, 0, 200 + i, 30, "dog", 0.9) for i in range(20)]
    assert [label for *_, label in outlines(boxed(tmp_path / "b", (480, 640), prediction=crowd)[0])].count("") >= 38


@pytest.mark.parametrize(("boxes", "colours", "label"), [(12, 3, "dog 90%"), (13, 3, "90%"), (13, 9, "dog 90%")])
def test_where_boxes_are_many_and_colours_few_the_legend_names_them(tmp_path, boxes, colours, label):
    legend = COLOURS | {f"class {i}": "#0000ff" for i in range(colours - 2)}
    row = [Box(0, 60 * i, 300, 60 * i + 50, "dog", 0.9) for i in range(boxes)]
    html, _ = boxed(tmp_path, (800, 600), legend, prediction=row, truth=[row[0]._replace(score=None)])
    assert {label for *_, label in outlines(html)} == {label, "dog" if "dog" in label else ""}


@pytest.mark.parametrize(
    ("size", "panel", "small"), [((64, 64), 170, True), ((96, 200), 200, False), ((480, 640), 290, False)]
)
def test_pictures_with_boxes_are_as_wide_as_their_labels_need(tmp_path, size, panel, small):
    html, _ = boxed(tmp_path, size, truth=[], prediction=[])
    assert html.count(f'<div class="boxed" style="--panel: {panel}px">') == 2
    assert f'<div class="pictures" style="--width: {2 * panel}px">' in html
    assert html.count('class="small"') == (4 if small else 0)
    assert outlines(html) == []


def test_figures_of_classes_are_a_table_of_their_own(tmp_path):
    a, b = (make_segmentation(tmp_path / name, ["sky", "road", "car"], absent=["sky"]) for name in "ab")
    one = text_of(page(a)).partition("Verdicts")[0]
    assert "eval miou 50.00%" in one
    assert one.endswith("eval iou sky – road 33.33% car 66.67% –: absent from the eval data. ")
    rewrite(
        b / "metrics.jsonl", lambda text: text.replace('"eval/iou_road": 0.3333333333333333', '"eval/iou_road": 0.25')
    )
    both = page(a, b)
    assert "eval iou a b sky – – road 33.33% 25.00% car 66.67% 66.67%" in text_of(both)
    assert '<td class="best">33.33%</td>' in both
    assert "eval iou road" not in text_of(both)


@pytest.mark.parametrize(("classes", "is_open"), [(60, True), (61, False)])
def test_a_table_of_many_classes_is_to_be_opened(tmp_path, classes, is_open):
    html = page(make_segmentation(tmp_path / "a", [f"class {i}" for i in range(classes)]))
    assert ("<details open><summary>eval iou" in html) == is_open


@pytest.mark.parametrize(
    ("size", "width", "small"), [((64, 64), 3 * 120, True), ((360, 480), 3 * 190, False), ((150, 150), 3 * 151, False)]
)
def test_panels_are_enlarged_crisply_or_made_to_fit(tmp_path, size, width, small):
    html = page(make_segmentation(tmp_path / "a", ["sky", "road"], size=size))
    assert f'<div class="pictures" style="--width: {width}px">' in html
    assert html.count('class="small"') == (8 if small else 0)

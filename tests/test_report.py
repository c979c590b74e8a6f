"""The report holds the trace's figures in one file, and a real browser draws it."""

import re
import shutil
import stat
import struct
import subprocess
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from sglang_macs import cli
from sglang_macs.observe import report, trace
from tests.support.traces import COLUMNS, LAYERS, ROWS, RUN, record, shown

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags with their attributes, and the text; fails on a tag that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A trace in which nothing is re-routed, so that tokens lose assignments; and its folder."""
    folder = tmp_path_factory.mktemp("trace")
    record(folder, passes=5, reroute="none")
    return trace.load(str(folder)), folder


def unpng(data: bytes) -> np.ndarray:
    """[height, width, 4] u8 of a PNG file as `report` writes them."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    start = data.index(b"IDAT") + 4
    size = struct.unpack(">I", data[start - 8 : start - 4])[0]
    assert zlib.crc32(data[start - 4 : start + size]) == struct.unpack(">I", data[start + size : start + size + 4])[0]
    rows = np.frombuffer(zlib.decompress(data[start : start + size]), dtype=np.uint8).reshape(height, 1 + 4 * width)
    return rows[:, 1:].reshape(height, width, 4)


def test_the_page_is_whole_and_loads_nothing(recorded):
    page = Page(report.page(recorded[0]))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    text = report.page(recorded[0])
    assert set(re.findall(r"url\(.{5}", text)) == {"url(data:"} and "@import" not in text
    assert text.count("image/jpeg") == len(recorded[0].pictures), "once, however many views show it"


def test_the_figures_are_the_traces(recorded):
    read, _ = recorded
    before, after = read.rank_rows()
    text = Page(report.page(read, row_us=2.0)).text
    ratio = [(rows.max(axis=-1) / rows.mean(axis=-1)).mean() for rows in (before, after)]
    assert f"{ratio[0]:.2f} → {ratio[1]:.2f}" in text and ratio[0] > ratio[1] + 0.05
    saved, slowest = int((before.max(axis=-1) - after.max(axis=-1)).sum()), int(before.max(axis=-1).sum())
    assert f"({saved:,} of {slowest:,})" in text and saved > 0
    assert f"{saved * 2.0 / 1e3:,.1f} ms" in text
    cells = before[:, :, 0].sum(axis=0) / before.sum(axis=0).mean(axis=-1)  # rank 0, by layer
    for layer, value in zip(LAYERS, cells, strict=True):
        assert f"layer {layer}" in text and f"{value:.2f}" in text


def test_the_chart_over_time_is_drawn_to_scale(recorded):
    read, _ = recorded
    slowest = [rows.max(axis=-1).sum(axis=-1) for rows in read.rank_rows()]
    chart = report._over_time(read)
    for rows, colour in zip(slowest, (report.BEFORE, report.AFTER), strict=True):
        (points,) = re.findall(rf"<path d='M([^']*)' fill='none' stroke='{colour}'", chart)
        y = [float(point.split()[1]) for point in points.split("L")][::2]  # a stair a pass
        assert y == pytest.approx(200 - rows / slowest[0].max() * 188, abs=0.06)


@pytest.mark.parametrize("ranks", [2, 64, 1024])
def test_every_rank_has_a_cell_of_its_own(ranks):
    cells = [cell for cell in report._cells(np.ones(ranks), 10, 0, 270, 17) if cell.startswith("<rect")]
    sides = [[float(re.search(rf" {name}='([^']*)'", cell)[1]) for name in ("x", "width")] for cell in cells]
    assert len(sides) == ranks and all(width > 0.2 for _, width in sides)
    ends = [x + width for x, width in sides]
    assert all(end <= x for end, (x, _) in zip(ends, sides[1:], strict=False)) and ends[-1] <= 280


def test_the_overlay_marks_exactly_the_tokens_that_lost_something(recorded):
    read, _ = recorded
    (picture,) = read.pictures
    drawn = unpng(report._outcome_png(picture, slice(None), read.top_k))
    assert drawn.shape == (ROWS, COLUMNS, 4)
    assert np.array_equal(drawn[..., 3] > 0, picture.clipped.sum(axis=0) > 0)
    lost = picture.dropped.sum(axis=0)
    assert lost.min() == 0 < lost.max(), "a case in which all or none lose something proves little"
    assert drawn[..., 3][lost == lost.max()].min() == drawn[..., 3].max() > drawn[..., 3][lost == 1].max()
    assert (drawn[lost > 0][:, :3] == report.DROPPED).all()
    drawn = unpng(report._importance_png(picture.importance[0]))
    brightness = drawn[..., :3].astype(int).sum(axis=-1)
    assert brightness.argmin() == picture.importance[0].argmin()
    assert brightness.argmax() == picture.importance[0].argmax()


@pytest.mark.parametrize(
    ("preset", "importance", "words", "short"),
    [
        ("rank", "gate", "the router's gate of each token's weakest assignment", "gate"),
        ("paper", "entropy", "the entropy weight of each token", "entropy weight"),
        ("rank", "entropy_gate", "entropy weight times gate of each token's weakest assignment", "weight x gate"),
    ],
)
def test_the_middle_panel_shows_what_the_plan_went_by_and_says_so(tmp_path, preset, importance, words, short):
    record(tmp_path, passes=1, preset=preset, importance=importance)
    read = trace.load(str(tmp_path))
    text = Page(report.page(read)).text
    mean = read.pictures[0].importance.mean(axis=0)
    assert words in text and f"{short} {mean.min():.3f} to {mean.max():.3f}" in text
    assert mean.std() > 0.01, "a panel of one colour shows nothing"
    assert ("overloaded expert" in text) == (preset == "rank"), "scope expert has no pressure"


def test_a_picture_that_was_recorded_in_part_has_figures_for_that_part(tmp_path):
    """The rest of its tokens came from the prefix cache: no NaN is shown, and shares are of what is known."""
    record(tmp_path, passes=1, parts=[[shown(0, 10, 14)]], reroute="none")
    read = trace.load(str(tmp_path))
    page = Page(report.page(read)).text
    assert not re.search(r"\bnan\b", page) and "58% of them recorded" in page
    (picture,) = read.pictures
    given = picture.clipped.sum() / (14 * len(LAYERS) * read.top_k)
    assert f"clipped {given:.1%}" in page and given > 0


def test_the_page_says_which_run_and_which_replicas_it_shows(tmp_path):
    for replica in range(2):
        record(tmp_path, passes=1, replica=replica)
    text = Page(report.page(trace.load(str(tmp_path)))).text
    assert f"run {RUN}: 2 passes" in text and "replicas 0, 1 together, 2 ranks each" in text
    assert "as replica 0, rank 0 saw it, one of 2" in text
    assert "of replica 1." in Page(report.page(trace.load(str(tmp_path), replica=1))).text


def test_a_long_trace_is_thinned_to_means_of_neighbours():
    thinned = report._thinned(np.arange(1001))
    assert len(thinned) == 201 <= report.MAX_POINTS and thinned[:2].tolist() == [2.0, 7.0] and thinned[-1] == 1000.0
    assert report._thinned(np.arange(7)).tolist() == list(range(7))


def test_what_the_trace_says_is_escaped(recorded):
    evil = dict(recorded[0].config, preset="<script>alert(1)</script>")
    page = report.page(trace.Trace(**{**vars(recorded[0]), "config": evil}))
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_command_writes_the_page(recorded, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert cli.main(["report", str(recorded[1]), "-o", str(out), "--row-us", "0.5"]) == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600, "users' pictures are in it"
    said = capsys.readouterr().out
    assert "µs a row" in out.read_text() and str(out) in said and f"run {RUN}, the latest of 1 in" in said
    assert cli.main(["report", str(recorded[1]), "-o", str(out), "--run", RUN, "--replica", "0"]) == 0
    capsys.readouterr()
    assert cli.main(["report", str(recorded[1]), "-o", str(out), "--run", "another"]) == 2
    assert cli.main(["report", str(tmp_path / "nowhere"), "-o", str(out)]) == 2
    assert cli.main(["report", str(recorded[1]), "-o", str(tmp_path / "no" / "folder.html")]) == 2
    assert all(line.startswith("sglang-macs report: ") for line in capsys.readouterr().err.splitlines())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium, then make test-browser")
def test_a_browser_draws_it(recorded, tmp_path):
    """Everything is visible: the charts' colours, and the photograph beside its red overlay."""
    page, shot = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(report.page(recorded[0]))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,2000"]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert shot.exists(), done.stderr[-2000:]
    from PIL import Image

    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (2000, 1100, 3)

    def found(colour: tuple[int, ...], within: int = 12) -> int:
        return int((np.abs(pixels - np.array(colour)).max(axis=-1) <= within).sum())

    for colour in (report.BEFORE, report.AFTER, report.SHARE):
        assert found(tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))) > 200, colour
    assert found((226, 232, 240)) > 1000, "the sections' borders"
    assert found((255, 255, 255), 0) > 300_000, "the sections"
    # The made-up picture of traces.py: red below, green to the right, blue in one corner, as nothing else is.
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    assert ((red > 200) & (green < 60) & (blue < 60)).sum() > 500 and ((green > 200) & (red < 60)).sum() > 500
    # Its overlay, on grey: red throughout, and redder where more was lost.
    reddish = (red - green > 60) & (np.abs(green - blue) < 40)
    assert reddish.sum() > 5000

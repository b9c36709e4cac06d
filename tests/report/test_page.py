"""The page: complete, self-contained, described in words, and never wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import fda_fast
from fda_fast.cli import app
from fda_fast.errors import InputError
from fda_fast.report.write import write_report
from fda_fast.times import TIMES, Times

pytest.importorskip("matplotlib", reason="the plots extra is not installed")

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Structure(HTMLParser):
    """Checks that tags close in order; keeps what is loaded, ids and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, dict(attrs))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def note(self, tag: str, attrs: dict[str, str | None]) -> None:
        self.tags.append(tag)
        self.loaded += [
            value or ""
            for name, value in attrs.items()
            if name in ("src", "href", "xlink:href", "srcset", "action") and value
        ]
        if attrs.get("id"):
            self.ids.append(str(attrs["id"]))
        if tag == "svg":
            self.pictures.append(attrs)


@pytest.fixture(scope="module")
def full(tiny, run: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section, made by the command."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    experts = [f"--expert={expert.name}={expert}" for expert in tiny.experts]
    arguments = ["report", str(run), "-o", str(path), "--pretrained", str(tiny.base), *experts]
    result = CliRunner().invoke(app, [*arguments, "--texts", str(texts), "--layers", "1"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"written: {path}\n"
    return path


def test_every_section_is_there(full: Path) -> None:
    text = full.read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Alignment",
        "Optimisation",
        "Spectrum of the anchors",
        "Subspace similarity",
        "Projection energy",
        "Representation bias",
        "Loss landscape",
        "Times",
        "How it was made",
    ]
    assert "it ends at the anchors kept, bit for bit" in text
    lead = re.search(r'<p class="lead">(.*?)</p>', text)
    assert lead is not None and "mean cosine of" in lead[1] and "Adaptation took" in lead[1]


def test_nothing_is_loaded_and_nothing_runs(full: Path) -> None:
    text = full.read_text()
    found = Structure(text)
    assert "script" not in found.tags
    assert all(value.startswith(("#", "data:")) for value in found.loaded), found.loaded
    outside = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert "http:" not in outside and "https:" not in outside and "@import" not in outside


def test_pictures_are_described_and_ids_unique(full: Path) -> None:
    found = Structure(full.read_text())
    # 3 constructions, adaptation; of one layer the spectrum, 2 overlaps, the energy, 2 landscapes;
    # and the bias of 3 experts.
    assert len(found.pictures) == 4 + 6 + 3
    assert all(p["role"] == "img" and len(str(p["aria-label"])) > 20 for p in found.pictures)
    assert len(found.ids) == len(set(found.ids))


def test_plots_take_the_colours_of_the_page(full: Path) -> None:
    text = full.read_text()
    body = text[text.index("<main>") :]
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", body)) == set()
    assert "stroke: var(--accent)" in body and "fill: var(--muted)" in body
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_the_record_alone(run: Path, tmp_path: Path) -> None:
    text = write_report(run, tmp_path / "page.html").read_text()
    Structure(text)
    assert "Spectrum of the anchors" in text and "<h2>Loss landscape" not in text
    assert "give --pretrained DIR and --expert NAME=DIR for each" in text


def test_axes_name_whole_epochs_and_the_last_step(run: Path, full: Path) -> None:
    pictures = re.findall(r"<svg.*?</svg>", full.read_text(), re.S)
    labels = {
        str(re.search(r'aria-label="([^"]*)"', picture)): re.findall(r"<text[^>]*>([^<]*)", picture)
        for picture in pictures
    }
    (epochs,) = (texts for name, texts in labels.items() if '"Adaptation:' in name)
    axis = epochs[: epochs.index("epoch")]
    assert axis and all(text.isdigit() for text in axis)
    (energies,) = (texts for name, texts in labels.items() if "Projection energy" in name)
    assert energies[: energies.index("step")] == ["0", "1", "8"]


def test_times_by_phase_and_layer(run: Path, tmp_path: Path) -> None:
    times = Times.read(run)
    assert list(times.phases) == ["read", "construct", "start", "adapt", "save", "write"]
    text = write_report(run, tmp_path / "page.html").read_text()
    part = text.split("<h2>Times")[1].split("</section>")[0]
    machine = times.machine
    assert f"{machine['threads']} thread" in part and f"torch {torch.__version__}" in part
    for name, seconds in times.layers.items():
        row = re.search(rf'<th scope="row">{re.escape(name)}</th>(.*?)</tr>', part)
        assert row is not None
        cells = [float(cell) for cell in re.findall(r"<td>([\d.,]+)</td>", row[1])]
        assert cells[:-1] == pytest.approx(
            [seconds[phase] for phase in times.phases if phase != "write"], abs=0.006
        )
        assert cells[-1] == pytest.approx(sum(seconds.values()), abs=0.006)
    lost = tmp_path / "lost"
    shutil.copytree(run, lost, ignore=shutil.ignore_patterns(TIMES))
    text = write_report(lost, tmp_path / "page.html").read_text()
    assert "<h2>Times" not in text and f"{TIMES} is not in the folder" in text
    (lost / TIMES).write_text("[]")
    with pytest.raises(InputError, match="damaged"):
        write_report(lost, tmp_path / "page.html")


def test_a_plain_merge_has_a_page_too(tiny, tmp_path: Path) -> None:
    fda_fast.merge(tiny.base, tiny.experts, tmp_path / "tsv", method="tsv", progress=False)
    text = write_report(tmp_path / "tsv", tmp_path / "page.html").read_text()
    Structure(text)
    assert "merged by TSV-M" in text and "<h2>Alignment" not in text


def test_what_others_wrote_is_escaped(run: Path, tmp_path: Path) -> None:
    hostile = '</li><script>alert("x")</script>'
    record = json.loads((run / "fda_report.json").read_text())
    record["notes"] = [hostile]
    for layer in record["layers"]:
        layer["layer"] = f"<b>{layer['layer']}"
    config = yaml.safe_load((run / "fda_config.yml").read_text())
    config["base_model"] = hostile
    (tmp_path / "fda_report.json").write_text(json.dumps(record))
    (tmp_path / "fda_config.yml").write_text(yaml.safe_dump(config))
    text = write_report(tmp_path, tmp_path / "page.html").read_text()
    found = Structure(text)
    assert "script" not in found.tags and "b" not in found.tags
    assert "&lt;script&gt;" in text and "&lt;b&gt;encoder.layer.0" in text


def test_refusals(tiny, run: Path, texts: Path, tmp_path: Path) -> None:
    experts = {path.name: path for path in tiny.experts}
    with pytest.raises(
        InputError, match="texts asks for need the checkpoints: --pretrained is missing"
    ):
        write_report(run, tmp_path / "page.html", texts=texts)
    with pytest.raises(InputError, match=r"expected a file for the page, got a folder.*\.html"):
        write_report(run, tmp_path)
    with pytest.raises(InputError, match="layer '7'"):
        write_report(run, tmp_path / "p.html", pretrained=tiny.base, experts=experts, layers="0,7")
    with pytest.raises(InputError, match="texts of sport"):
        write_report(
            run,
            tmp_path / "p.html",
            pretrained=tiny.base,
            experts=experts,
            texts={"sport": texts},
        )
    result = CliRunner().invoke(app, ["report", str(run), "--expert", "movie"])
    assert result.exit_code == 2 and "NAME=PATH" in result.stderr
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(run: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from fda_fast.cli import main\n"
        f"sys.argv = ['fda-fast', 'report', {str(run)!r}]\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'fda-fast[plots]'" in done.stderr


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no chromium to look at the page with")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(
    full: Path, tmp_path: Path, width: int
) -> None:
    """In a frame of that width, because a headless window has a least width of its own."""
    probe = tmp_path / "probe.html"
    page = full.read_text().replace("<details>", "<details open>")
    (tmp_path / "page.html").write_text(page)
    probe.write_text(
        f"<!doctype html><iframe src='page.html' width={width} height=800 style='border:0'>"
        "</iframe>"
        "<p id=found></p><script>onload = () => { const d = document.querySelector('iframe')"
        ".contentDocument; document.querySelector('#found').textContent = 'wide ' + "
        "d.documentElement.scrollWidth + ' of ' + d.documentElement.clientWidth + ', text ' + "
        "getComputedStyle(d.body).color; }</script>"
    )
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r"wide (\d+) of (\d+), text rgb\((\d+)", done.stdout)
    assert found is not None, done.stderr[-500:]
    assert int(found[1]) <= int(found[2]) == width
    assert found[3] != "0"  # the style sheet applies

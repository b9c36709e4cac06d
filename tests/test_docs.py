"""The migration guides: every example is run as it stands, on tiny checkpoints of the right kind.

A YAML block is saved under the name in its first line. Lines of a console block that call fda-fast
run in this process. What needs fusion-bench is compiled only where it is not installed.
"""

from __future__ import annotations

import importlib.metadata
import lzma
import re
import shlex
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

DOCS = Path(__file__).parents[1] / "docs"
ENCODER = Path(__file__).parent / "checkpoints" / "data" / "image_encoder.pt.xz"
# Not find_spec: once imported, fusion_bench is a lazy module without a spec.
HAS_FUSION_BENCH = "fusion-bench" in {d.name for d in importlib.metadata.distributions()}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def bert(tiny: Any, folder: Path) -> None:
    for name in ("base", "movie", "news", "lora"):
        shutil.copytree(tiny.folder / name, folder / name)


def llama(tiny: Any, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    for name in ("math", "code"):
        moved(model).save_pretrained(folder / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still says "gradient checkpointing"
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "chat-lora")


def moved(model: Any) -> Any:
    from copy import deepcopy

    expert = deepcopy(model)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return expert


def encoders(tiny: Any, folder: Path) -> None:
    """Pickled modules of open_clip 2.0.2 itself, and fine-tunes: other numbers in their bytes."""
    from fda_fast.checkpoints.reader import Checkpoint

    root = folder / "checkpoints" / "ViT-B-32"
    root.mkdir(parents=True)
    zeroshot = root / "zeroshot.pt"
    zeroshot.write_bytes(lzma.decompress(ENCODER.read_bytes()))
    base = Checkpoint.open(zeroshot)
    for seed, task in enumerate(("MNIST", "DTD")):
        generator = torch.Generator().manual_seed(seed)
        (root / task).mkdir()
        shutil.copyfile(zeroshot, root / task / "finetuned.pt")
        with open(root / task / "finetuned.pt", "r+b") as stream:
            for name, info in base.names.items():
                if "visual" in name:
                    tensor = base.read([name])[name]
                    tensor += 0.01 * torch.randn(tensor.shape, generator=generator)
                    stream.seek(info.offset)
                    stream.write(tensor.numpy().tobytes())


def nothing(tiny: Any, folder: Path) -> None:
    """For pages that make their own models."""


PAGES: dict[str, Callable[[Any, Path], None]] = {
    "from-mergekit": llama,
    "from-fusion-bench": bert,
    "from-task-vectors": encoders,
    "from-transformers": bert,
    "gradient-matching": nothing,
}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, as above
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fusion_bench's imports
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_example_runs(
    page: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PAGES[page](tiny, tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((DOCS / f"{page}.md").read_text())
    assert blocks
    namespace: dict[str, Any] = {"__name__": "example"}
    for language, text in blocks:
        {"yaml": save, "console": console, "python": python}[language](text, page, namespace)


def save(text: str, page: str, namespace: dict[str, Any]) -> None:
    first = text.partition("\n")[0]
    assert re.fullmatch(r"# [\w-]+\.yaml", first), "a YAML block begins with its file's name"
    content = yaml.safe_load(text)
    if "_target_" in content:
        check_method(content)
    Path(first[2:]).write_text(text)


def check_method(content: dict[str, Any]) -> None:
    """A FusionBench method: its keys are arguments, and its settings ones that merges take."""
    from fda_fast.config import Parameters

    target, parameters = content.pop("_target_"), content.pop("parameters", {})
    assert target == "fda_fast.compat.fusion_bench.FDA"
    Parameters.model_validate({**content, **parameters})
    if HAS_FUSION_BENCH:
        from fda_fast.compat.fusion_bench import FDA

        FDA(**content, parameters=parameters)


def console(text: str, page: str, namespace: dict[str, Any]) -> None:
    from fda_fast.cli import app

    for line in text.splitlines():
        assert line.startswith("$ "), line
        command, *arguments = shlex.split(line[2:])
        if command == "fusion_bench":
            continue  # run for real, on local models, in compat/test_fusion_bench.py
        assert command == "fda-fast"
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{line}\n{done.output}{done.exception!r}"


def python(text: str, page: str, namespace: dict[str, Any]) -> None:
    code = compile(text, f"{page}.md", "exec")
    if "fusion_bench" in text and not HAS_FUSION_BENCH:
        return
    exec(code, namespace)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([\w./-]+)\)", (DOCS / f"{page}.md").read_text()):
            assert (DOCS / target).exists(), f"{page}: {target}"

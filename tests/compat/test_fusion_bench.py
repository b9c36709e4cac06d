"""FDA inside the real FusionBench: its command line with its dummy task pool, on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fda_fast
from fda_fast.errors import InputError

CONFIG = Path(fda_fast.__file__).parent / "compat" / "fusion_bench_config" / "method" / "fda.yaml"
SMALL: dict[str, Any] = {"anchors": 6, "tokens": 3, "steps": 6, "epochs": 3, "device": "cpu"}

needs_fusion_bench = pytest.mark.skipif(
    importlib.util.find_spec("fusion_bench") is None, reason="fusion-bench is not installed"
)


def test_the_config_names_only_what_merges_take() -> None:
    from fda_fast.config import Parameters

    content = yaml.safe_load(CONFIG.read_text())
    assert content.pop("_target_") == "fda_fast.compat.fusion_bench.FDA"
    assert content.keys() - {"device", "parameters"} <= Parameters.model_fields.keys()


def load(folder: Path) -> torch.nn.Module:
    from transformers import BertModel

    return BertModel.from_pretrained(folder)


@needs_fusion_bench
@pytest.mark.filterwarnings("ignore")  # its own imports warn
def test_a_pool_of_modules(tiny) -> None:
    from fusion_bench.modelpool import BaseModelPool

    from fda_fast.compat.fusion_bench import FDA

    movie, news, _ = tiny.experts
    models = {"_pretrained_": load(tiny.base), "movie": load(movie), "news": load(news)}
    merged = FDA(start="task_arithmetic", parameters={"adapt_distance": "l2"}, **SMALL).run(
        BaseModelPool(dict(models))
    )
    pretrained = models.pop("_pretrained_")
    expected = fda_fast.merge(
        pretrained, models, start="task_arithmetic", adapt_distance="l2", progress=False, **SMALL
    )
    ours, theirs = merged.state_dict(), expected.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    weight = "encoder.layer.0.output.dense.weight"
    assert not torch.equal(ours[weight], pretrained.state_dict()[weight])
    with pytest.raises(InputError, match="a model _pretrained_"):
        FDA().run(models)


@needs_fusion_bench
@pytest.mark.filterwarnings("ignore")
def test_a_lazy_pool(tiny) -> None:
    from fusion_bench.utils.lazy_state_dict import LazyStateDict
    from transformers import BertModel

    from fda_fast.compat.fusion_bench import FDA

    lazy = {
        name: LazyStateDict(str(folder), meta_module_class=BertModel)
        for name, folder in {"_pretrained_": tiny.base, "movie": tiny.experts[0]}.items()
    }
    from fusion_bench.modelpool import BaseModelPool

    pool = BaseModelPool({"_pretrained_": load(tiny.base), "movie": load(tiny.experts[0])})
    whole = FDA(**SMALL).run(pool)
    pool.load_model = lazy.__getitem__
    merged = FDA(**SMALL).run(pool)
    ours, theirs = merged.state_dict(), whole.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@needs_fusion_bench
def test_the_command_line_on_the_dummy_task_pool(tiny, tmp_path: Path) -> None:
    """``fusion_bench method=fda taskpool=dummy``: the program, its pool and its report."""
    models = dict(zip(("_pretrained_", "movie", "news"), (tiny.base, *tiny.experts), strict=False))
    target = "transformers.BertModel.from_pretrained"
    pool = {
        "_target_": "fusion_bench.modelpool.BaseModelPool",
        "models": {
            name: {"_target_": target, "pretrained_model_name_or_path": str(folder)}
            for name, folder in models.items()
        },
    }
    (tmp_path / "conf" / "modelpool").mkdir(parents=True)
    (tmp_path / "conf" / "modelpool" / "tiny.yaml").write_text(yaml.safe_dump(pool))
    settings = [f"method.{key}={value}" for key, value in SMALL.items()]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fusion_bench.scripts.cli"),
            *("--config-dir", str(CONFIG.parents[1])),
            f"hydra.searchpath=[file://{tmp_path}/conf]",
            *("method=fda", "modelpool=tiny", "taskpool=dummy", "fabric.accelerator=cpu"),
            *("fabric.devices=1", "method.start=tsv", *settings),
            f"merged_model_save_path={tmp_path}/merged",
            f"report_save_path={tmp_path}/report.json",
            f"path.log_dir={tmp_path}/log",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    info = json.loads((tmp_path / "report.json").read_text())["model_info"]
    expected = fda_fast.merge(
        load(tiny.base),
        {"movie": load(tiny.experts[0]), "news": load(tiny.experts[1])},
        start="tsv",
        progress=False,
        **SMALL,
    )
    assert info["all_params"] == sum(p.numel() for p in expected.parameters())

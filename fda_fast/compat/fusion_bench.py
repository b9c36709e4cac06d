"""FDA as an algorithm of FusionBench: ``_target_: fda_fast.compat.fusion_bench.FDA``.

    fusion_bench --config-dir "$(python -m fda_fast.compat.fusion_bench)" method=fda ...

Needs the package fusion-bench.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_bench.method.base_algorithm import BaseAlgorithm
from fusion_bench.mixins import auto_register_config
from fusion_bench.modelpool import BaseModelPool
from torch import nn

from fda_fast.errors import InputError
from fda_fast.memory_merge import merge_in_memory

CONFIG = Path(__file__).with_name("fusion_bench_config")
"""Folder for fusion_bench's ``--config-dir``, with method/fda.yaml."""

_log = logging.getLogger("fda_fast")


@auto_register_config
class FDA(BaseAlgorithm):  # type: ignore[misc]  # untyped package
    """Merge the models of a pool through Functional Dual Anchors.

    The pool's ``_pretrained_`` is the base, every regular model an expert under its name in the
    pool. No datasets are used. Pre-instantiated models are not modified.

    Args:
        start: where adaptation begins: "pretrained", "task_arithmetic", "tsv", "wudi".
        preset: published settings by name, such as "vit-b-32"; None: by the base model.
        scaling: factor of the merged task vector of ``start``.
        init: "weights" or "gaussian".
        anchors, tokens, steps, lr: of construction.
        epochs, adapt_lr, batch_size: of adaptation.
        engine, precision, scope, outside, seed: as ``fda_fast.merge``.
        device: "auto", "cpu", "cuda", "cuda:N": where layers are computed.
        parameters: anything else that ``fda_fast.merge`` takes.
    """

    def __init__(
        self,
        start: str = "pretrained",
        preset: str | None = None,
        scaling: float | None = None,
        init: str | None = None,
        anchors: int | None = None,
        tokens: int | None = None,
        steps: int | None = None,
        lr: float | None = None,
        epochs: int | None = None,
        adapt_lr: float | None = None,
        batch_size: int | None = None,
        engine: str = "auto",
        precision: str = "auto",
        scope: str = "auto",
        outside: str | None = None,
        seed: int = 0,
        device: str = "auto",
        parameters: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

    def run(self, modelpool: BaseModelPool | dict[str, nn.Module]) -> nn.Module:
        """The merged model.

        Args:
            modelpool: with "_pretrained_" and at least one other model.

        Raises:
            InputError: no pretrained model, or what ``fda_fast.merge`` refuses.
        """
        if not isinstance(modelpool, BaseModelPool):
            modelpool = BaseModelPool(modelpool)
        if not modelpool.has_pretrained:
            raise InputError("modelpool", expected="a model _pretrained_", got="none")
        pretrained = modelpool.load_model("_pretrained_")
        experts = {name: modelpool.load_model(name) for name in modelpool.model_names}
        given = {name: getattr(self, name) for name in _SETTINGS}
        settings = {k: v for k, v in {**given, **(self.parameters or {})}.items() if v is not None}
        # A lazy state dict brings its module, without weights.
        structure = None if isinstance(pretrained, nn.Module) else pretrained.meta_module
        if structure is not None:
            pretrained = dict(pretrained.items())
            experts = {name: dict(expert.items()) for name, expert in experts.items()}
        done = merge_in_memory(pretrained, experts, model=structure, **settings)
        for note in done.notes:
            _log.info(note)
        if isinstance(done.model, nn.Module):
            return done.model
        assert structure is not None
        merged: nn.Module = copy.deepcopy(structure).to_empty(device="cpu")
        merged.load_state_dict(done.model)
        return merged


_SETTINGS = (
    *("start", "preset", "scaling", "init", "anchors", "tokens", "steps", "lr"),
    *("epochs", "adapt_lr", "batch_size", "engine", "precision", "scope", "outside"),
    *("seed", "device"),
)

if __name__ == "__main__":
    print(CONFIG)

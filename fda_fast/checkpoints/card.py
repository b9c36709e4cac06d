"""The model card: README.md with the front matter by which model hubs show a merge."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from fda_fast.checkpoints.reader import Checkpoint

_MODEL_ID = re.compile(
    r"(?!.*(--|\.\.))[A-Za-z0-9](?:[\w.-]*\w)?(/[A-Za-z0-9](?:[\w.-]*\w)?)?", re.A
)
_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def hub_name(checkpoint: Checkpoint) -> str:
    """A checkpoint's public name: its hub id if it lies in a hub cache, else its directory's name.

    A path of this machine is never given away. config.json's ``_name_or_path`` is no help: in a
    fine-tune it names the model it was made from.
    """
    for part in checkpoint.path.absolute().parts:
        found = _CACHE.fullmatch(part)
        if found:
            return f"{found[1]}/{found[2]}"
    return checkpoint.path.absolute().name


def model_card(
    title: str,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint] | Sequence[Checkpoint],
    *,
    method: str,
    settings: Mapping[str, object],
    config_yaml: str = "",
) -> str:
    """README.md of a merged model. The same arguments give the same text: no date, no paths.

    Args:
        title: the model's name.
        base: the base model.
        experts: the merged experts, by name or in order.
        method: one line: "Functional Dual Anchors from the pretrained model".
        settings: what decided the result, shown as a table in this order.
        config_yaml: the configuration, shown as it is.
    """
    named = experts if isinstance(experts, Mapping) else {e.role: e for e in experts}
    sources = [hub_name(base), *(hub_name(expert) for expert in named.values())]
    lines = ["---"]
    # The Hub refuses a card with a name here that no model could have.
    known = [name for name in dict.fromkeys(sources) if _MODEL_ID.fullmatch(name)]
    lines += ["base_model:", *(f"- {json.dumps(name)}" for name in known)] if known else []
    lines += ["library_name: transformers", "tags:", "- fda", "- mergekit", "- merge"]
    lines += ["---", ""]
    lines += [f"# {_inline(title)}", ""]
    lines += [
        f"A merge of {len(named)} fine-tuned models by {_inline(method)}, made with fda_fast "
        "(Functional Dual Anchors, arXiv 2510.21223).",
        "",
        f"Base model: {_inline(sources[0])}",
        "",
        "| expert | model |",
        "|---|---|",
    ]
    lines += [f"| {_inline(n)} | {_inline(hub_name(expert))} |" for n, expert in named.items()]
    if settings:
        lines += ["", "| setting | value |", "|---|---|"]
        lines += [f"| {_inline(str(k))} | {_inline(str(v))} |" for k, v in settings.items()]
    if config_yaml:
        fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", config_yaml)), default=0))
        lines += ["", "Configuration:", "", f"{fence}yaml", config_yaml.rstrip("\n"), fence]
    return "\n".join(lines) + "\n"


def _inline(text: str) -> str:
    """Text that stays one table cell: no line breaks, no bars, no HTML."""
    flat = " ".join(text.split())
    return flat.replace("|", "\\|").replace("<", "&lt;")

"""Which tensors of a model each starting point merges, and how the rest are treated."""

from __future__ import annotations

import re
from typing import Literal

from fda_fast.errors import InputError

Method = Literal["task_arithmetic", "tsv", "wudi"]
Rules = Literal["auto", "vision", "nlu"]
Treatment = Literal["sum", "svd", "mean", "wudi", "pretrained"]

_VISION_LINEAR = re.compile(
    r"(^|\.)(in_proj_weight|(out_proj|c_fc|c_proj|q_proj|k_proj|v_proj|fc1|fc2)\.weight)$"
)
_HEAD = re.compile(
    r"(^|[._])(classifier|lm_head|score|qa_outputs|cls|pre_classifier|text_projection"
    r"|visual_projection)([._]|$)"
)
_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|shared|relative_attention_bias)([._]|$)", re.I)
_NORM = re.compile(r"norm|(^|\.)ln_?[a-z0-9]*\.", re.I)


def treatment(method: Method, name: str, ndim: int, rules: Rules = "auto") -> Treatment:
    """How one tensor is merged.

    Task Arithmetic sums every task vector. TSV-M: "svd" for matrices, the mean of the task vectors
    for everything else. WUDI: "wudi" for the weights of linear layers, everything else stays
    pretrained. What counts differs between the published scripts:

    ======== ============================================ ==========================================
    rules    TSV-M: matrices except                       WUDI: matrices
    ======== ============================================ ==========================================
    vision   text_projection                              in_proj_weight, out_proj, c_fc, c_proj
                                                          (here also under Hugging Face's names:
                                                          q_proj, k_proj, v_proj, fc1, fc2)
    nlu      text_projection, classifier                  all but classifier, bias, LayerNorm,
                                                          embeddings
    auto     task heads (classifier, lm_head, score, ...) all but task heads, embeddings and norms
    ======== ============================================ ==========================================

    "auto" is the NLU script's choice under the names other architectures use. Published TSV-M
    merges position and word embeddings by SVD too, and so does "auto".

    Args:
        method: "task_arithmetic", "tsv" or "wudi".
        name: the tensor's name in the checkpoint.
        ndim: its number of dimensions.
        rules: "auto", "vision" or "nlu".

    Raises:
        InputError: unknown method or rules.
    """
    if rules not in ("auto", "vision", "nlu"):
        raise InputError("rules", expected="auto | vision | nlu", got=repr(rules))
    if method == "task_arithmetic":
        return "sum"
    if method == "tsv":
        return "svd" if ndim == 2 and not _tsv_excepts(name, rules) else "mean"
    if method == "wudi":
        return "wudi" if ndim == 2 and _wudi_takes(name, rules) else "pretrained"
    raise InputError("starting point", expected="task_arithmetic | tsv | wudi", got=repr(method))


def _tsv_excepts(name: str, rules: Rules) -> bool:
    if rules == "auto":
        return bool(_HEAD.search(name))
    return "text_projection" in name or (rules == "nlu" and "classifier" in name)


def _wudi_takes(name: str, rules: Rules) -> bool:
    if rules == "vision":
        return bool(_VISION_LINEAR.search(name))
    if rules == "nlu":
        return not any(word in name for word in ("classifier", "bias", "LayerNorm", "embeddings"))
    return not (_HEAD.search(name) or _EMBEDDING.search(name) or _NORM.search(name))

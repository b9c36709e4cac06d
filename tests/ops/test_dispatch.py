"""Which backend serves which tensor, and what is said when none can."""

import pytest
import torch

from fda_fast.ops import dispatch
from fda_fast.ops.reference import activation as twin

X = torch.zeros(3)


def test_available_lists_every_backend():
    found = dispatch.available()
    assert [*found] == ["torch", "cpu", "triton", "cuda"]
    assert found["torch"] == ""


def test_auto_takes_native_code_for_float32_and_the_twin_for_the_rest(monkeypatch):
    monkeypatch.delenv("FDA_FAST_BACKEND", raising=False)
    expected = "torch" if dispatch.available()["cpu"] else "cpu"
    package = dispatch._PACKAGES[expected]
    assert dispatch.implementation("activation", X).__name__ == f"{package}.activation"
    assert dispatch.implementation("activation", X.double()) is twin
    assert dispatch.implementation("activation", X.bfloat16()) is twin


def test_autograd_gets_the_twin():
    leaf = X.clone().requires_grad_()
    assert dispatch.implementation("activation", leaf) is twin
    with torch.no_grad():
        assert dispatch.implementation("activation", leaf) is dispatch.implementation(
            "activation", X
        )


def test_environment_changes_auto_only(monkeypatch):
    monkeypatch.setenv("FDA_FAST_BACKEND", "torch")
    assert dispatch.implementation("activation", X) is twin
    if not dispatch.available()["cpu"]:
        assert dispatch.implementation("activation", X, "cpu") is not twin
    monkeypatch.setenv("FDA_FAST_BACKEND", "gpu")
    with pytest.raises(RuntimeError, match="FDA_FAST_BACKEND=gpu is not a backend"):
        dispatch.implementation("activation", X)


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(RuntimeError, match="backend 'opencl' is not known; expected auto or one"):
        dispatch.implementation("activation", X, "opencl")
    if not dispatch.available()["cpu"]:
        with pytest.raises(RuntimeError, match=r"activation on torch\.float64 on cpu: it computes"):
            dispatch.implementation("activation", X.double(), "cpu")
        with pytest.raises(RuntimeError, match="this operation has no cpu implementation"):
            dispatch.implementation("nothing", X, "cpu")
    if dispatch.available()["cuda"]:
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot compute activation"):
            dispatch.implementation("activation", X, "cuda")

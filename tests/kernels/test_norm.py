import pytest

from fda_fast.kernels import launch, norm
from fda_fast.ops.reference import norm as twin

EPS = 1e-5


@pytest.fixture
def case(draw):
    def make(tasks, rows, width, scale=1.0):
        big = {name: draw(tasks, rows, width, scale=scale) for name in ("x", "dx", "t")}
        big |= {name: draw(tasks, rows, width) for name in ("g", "S", "b")}
        big["dx"] *= 1e-2
        small = {name: draw(tasks, width, scale=1e-2) for name in ("tw", "tb", "mw", "mb")}
        return big | small | {"weight": 1 + draw(width), "bias": draw(width)}

    return make


def all_sweeps(hold, kind, c):
    hold(norm.forward, twin.forward, kind,
         *(c[n] for n in ("x", "dx", "weight", "bias", "tw", "tb")), EPS)  # fmt: skip
    hold(norm.backward, twin.backward, kind, c["x"], c["g"], c["weight"], EPS, True, True, True)
    hold(norm.tangent, twin.tangent, kind, *(c[n] for n in ("x", "t", "weight", "mw", "mb")), EPS)
    names = ("x", "dx", "g", "t", "S", "b", "weight", "tw", "mw")
    hold(norm.reverse, twin.reverse, kind, *(c[n] for n in names), EPS, True)
    hold(norm.adjoint, twin.adjoint, kind,
         *(c[n] for n in ("x", "dx", "b", "weight", "tw")), EPS, True, True, True)  # fmt: skip


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(
    "shape",
    [(1, 2, 1), (2, 2, 17), (1, 1, 777), (1, 1, 1023), (1, 1, 1024), (2, 1, 1025)],
)
def test_sweeps(kind, shape, hold, case):
    all_sweeps(hold, kind, case(*shape))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_more_rows_than_partial_sums(kind, hold, case, monkeypatch):
    monkeypatch.setattr(norm, "CHUNKS", 3)
    c = case(2, 7, 5)
    hold(norm.backward, twin.backward, kind, c["x"], c["g"], c["weight"], EPS, True, True, True)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_magnitudes(kind, scale, hold, case):
    all_sweeps(hold, kind, case(1, 2, 70, scale))


def test_rows_wider_than_a_program(hold, case, monkeypatch):
    monkeypatch.setattr(launch, "WIDEST_ROW", 16)
    all_sweeps(hold, "layer", case(1, 2, 20))


def test_no_rows(hold, case):
    all_sweeps(hold, "layer", case(2, 0, 8))


def without(c, *absent):
    return {name: None if name in absent else value for name, value in c.items()}


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_absent_terms(kind, hold, case):
    c = case(2, 1, 21)
    names = ("x", "dx", "weight", "bias", "tw", "tb")
    for absent in ("dx", "weight", "bias", "tw", "tb", ("tw", "tb"), names[1:]):
        d = without(c, *([absent] if isinstance(absent, str) else absent))
        hold(norm.forward, twin.forward, kind, *(d[n] for n in names), EPS)
    names = ("x", "t", "weight", "mw", "mb")
    for absent in ("t", "weight", "mw", "mb", ("t", "mw"), names[1:]):
        d = without(c, *([absent] if isinstance(absent, str) else absent))
        hold(norm.tangent, twin.tangent, kind, *(d[n] for n in names), EPS)
    for need in [(True, False, False), (False, True, False), (False, False, True), (False,) * 3]:
        hold(norm.backward, twin.backward, kind, c["x"], c["g"], None, EPS, *need)
        hold(norm.adjoint, twin.adjoint, kind, c["x"], None, c["b"], None, c["tw"], EPS, *need)
    names = ("x", "dx", "g", "t", "S", "b", "weight", "tw", "mw")
    for absent in ("dx", "g", "t", "weight", "tw", "mw", ("t", "mw"), (*names[1:4], *names[6:])):
        d = without(c, *([absent] if isinstance(absent, str) else absent))
        hold(norm.reverse, twin.reverse, kind, *(d[n] for n in names), EPS, absent == "mw")

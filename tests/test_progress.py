"""What is drawn, when, and that the silent display reads nothing from the device."""

from __future__ import annotations

import io
import time

import pytest
import torch
from rich.console import Console

from fda_fast.progress import Display, Estimate, Log, Terminal, clock, display, step_bar


class Unreadable(torch.Tensor):
    """A result that is still being computed: reading it would wait for the device."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("read")


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 61, 3600 * 26 + 62)] == ["0:00", "1:00", "1:01", "26:01:02"]


def test_nothing_is_read_between_two_reports() -> None:
    tensor = torch.zeros(2).as_subclass(Unreadable)
    quiet = Display()
    quiet.begin("construct", "layer", 0, 10, ["a"])
    quiet.on_step(1, tensor, tensor)
    log = Log(io.StringIO(), interval=1000)
    log.begin("construct", "layer", 0, 10, ["a"])
    log.on_step(1, tensor, tensor)
    log.on_epoch(1, tensor)


def test_log_lines_tell_where_it_is() -> None:
    stream = io.StringIO()
    log = Log(stream, interval=0)
    log.start(12, 3)
    log.begin("construct", "encoder.layer.3", 3, 100, ["movie", "news"])
    log.on_step(40, torch.tensor([4.0, 6.0]), torch.tensor([[0.5, 0.1]]))
    log.end()
    log.begin("adapt", "encoder.layer.3", 3, 10, ["a", "b", "c", "d"])
    log.on_epoch(5, torch.tensor(-0.9))
    log.end()
    log.layer_done()
    log.begin("write", "out", 11, 40, [])
    log.on_tensor(7)
    text = stream.getvalue()
    assert "merging 12 layer(s), 3 of them finished earlier" in text
    assert "layer 4/12 encoder.layer.3 | construct movie, news | 40/100 | loss 5.0000" in text
    assert "mean cos 0.300" in text
    assert "adapt 4 tasks | 5/10 | loss -0.9000" in text
    assert "write out | 7/40 tensors" in text
    assert text.count("left") == 3
    assert "\x1b" not in text


def test_terminal_draws_and_gives_the_cursor_back() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=160)
    with pytest.raises(KeyboardInterrupt), Terminal(console) as shown:
        shown.start(2)
        shown.begin("construct", "h.0[x]", 0, 10, ["a"])  # brackets are not markup
        shown._next = 0
        shown.on_step(4, torch.tensor([2.0]), torch.tensor([[0.25]]))
        shown.note("[bold] is shown as it is")
        shown.end()
        raise KeyboardInterrupt
    text = stream.getvalue()
    assert "loss 2.0000" in text and "mean cos 0.250" in text and "h.0[x]" in text
    assert "[bold] is shown as it is" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_estimate_counts_only_this_runs_time(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    estimate = Estimate(10, finished=4)
    assert estimate.left() is None
    now[0] += 10
    estimate.layer_done()
    assert estimate.left() == pytest.approx(50)
    estimate.within("construct", 1.0)
    now[0] += 8.5
    assert estimate.left() == pytest.approx(18.5 / 1.85 * 4.15)


def test_pipes_get_lines_and_quiet_gets_nothing(capfd) -> None:
    assert type(display(False)) is Display
    assert type(display(True)) is Log
    with step_bar(3, 16) as on_step:
        on_step(1, torch.tensor([1.0]), torch.tensor([[0.0]]))
    assert capfd.readouterr().out == ""


def test_the_last_step_of_a_phase_is_shown_however_short() -> None:
    stream = io.StringIO()
    log = Log(stream, interval=1000)
    log.begin("construct", "layer", 0, 10, ["a"])
    log.on_step(10, torch.tensor([2.0]), torch.tensor([[0.25]]))
    assert "10/10 | loss 2.0000 | mean cos 0.250" in stream.getvalue()

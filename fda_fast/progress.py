"""What a person sees while it runs: a live display on a terminal, lines in a log file.

The loops call ``on_step`` after every step with tensors that may still be computing; reading one
waits for the device, so a display reads them a few times per second at most.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch import Tensor

TERMINAL_SECONDS = 0.3
LOG_SECONDS = 10.0
CONSTRUCTION_SHARE = 0.85
"""Part of a layer's time that construction takes, until one layer has been measured."""


def clock(seconds: float) -> str:
    """``seconds`` as h:mm:ss or m:ss."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Estimate:
    """Time left, from the time that the finished part of the layers took.

    Args:
        layers: how many there are.
        finished: how many an earlier run finished; they took no time of this one.
    """

    def __init__(self, layers: int, finished: int = 0) -> None:
        self.layers = max(1, layers)
        self.done = self.resumed = finished
        self.begun = time.monotonic()
        self.fraction = 0.0  # of the current layer
        self._share = CONSTRUCTION_SHARE
        self._seconds = {"construct": 0.0, "adapt": 0.0}

    def within(self, phase: str, part: float) -> None:
        """Note that ``part`` (0 to 1) of a phase of the current layer is done."""
        if phase == "construct":
            self.fraction = self._share * part
        else:
            self.fraction = self._share + (1 - self._share) * part

    def spent(self, phase: str, seconds: float) -> None:
        """Learn the shares of the phases from a finished one."""
        if phase not in self._seconds:
            return
        self._seconds[phase] += seconds
        total = sum(self._seconds.values())
        if self.done > self.resumed and total > 0:
            self._share = self._seconds["construct"] / total

    def layer_done(self) -> None:
        """The current layer is finished."""
        self.done += 1
        self.fraction = 0.0

    def left(self) -> float | None:
        """Seconds left, or None while nothing can be said."""
        worked = self.done - self.resumed + self.fraction
        if worked <= 0:
            return None
        rate = (time.monotonic() - self.begun) / worked
        return rate * (self.layers - self.done - self.fraction)


class Display:
    """The silent display, and the protocol of the others.

    A merge calls ``start``, then per layer ``begin`` (once per phase), ``on_step`` or
    ``on_epoch`` at will, ``end`` after each phase and ``layer_done``; then ``begin`` and
    ``on_tensor`` while the model is written; ``note`` at any time. Used
    as a context manager it restores the terminal whatever happens.
    """

    interval = float("inf")

    def __init__(self) -> None:
        self._estimate = Estimate(1)
        self._next = 0.0
        self._layer = self._phase = ""
        self._index = self._total = self._before = 0
        self._of = 1
        self._begun = 0.0
        self._cosine: float | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def start(self, layers: int, finished: int = 0) -> None:
        """A merge of ``layers`` begins, ``finished`` of them done by an earlier run."""
        self._estimate = Estimate(layers, finished)

    def begin(
        self, phase: str, layer: str, index: int, total: int, tasks: Sequence[str], of: int = 1
    ) -> None:
        """A phase ("construct", "adapt", "write") of layer number ``index`` begins.

        Args:
            phase: its name.
            layer: the layer's name.
            index: its number, from 0.
            total: steps or epochs it takes.
            tasks: the experts it works on.
            of: how many such phases the layer has (groups of tasks).
        """
        same = (phase, layer) == (self._phase, self._layer)
        self._before = self._before + self._total if same else 0
        self._phase, self._layer, self._index = phase, layer, index
        self._total, self._of, self._cosine = total, of, None
        self._begun = time.monotonic()
        self._next = self._begun + min(self.interval, 1e9)
        self._show(f"{', '.join(tasks)}" if len(tasks) <= 3 else f"{len(tasks)} tasks")

    def on_step(self, step: int, loss: Tensor, cosines: Tensor) -> None:
        """After every construction step; ``StepCallback`` of ``construct``."""
        if not self._due(step):
            return
        self._cosine = cosines.mean().item()
        self._report(step, loss.mean().item())

    def on_epoch(self, epoch: int, loss: Tensor) -> None:
        """After every epoch of adaptation."""
        if not self._due(epoch):
            return
        self._report(epoch, loss.item())

    def on_tensor(self, done: int) -> None:
        """After every tensor of the model written."""
        if time.monotonic() >= self._next:
            self._update(done, None)
            self._next = time.monotonic() + self.interval

    def end(self) -> None:
        """The phase is over."""
        self._estimate.spent(self._phase, time.monotonic() - self._begun)

    def layer_done(self) -> None:
        """The layer is finished and saved."""
        self._estimate.layer_done()

    def note(self, text: str) -> None:
        """Something the user should know, once."""

    def _due(self, step: int) -> bool:
        """Whether to read a result: every ``interval``, and the last one of a phase."""
        last = step == self._total and self.interval < float("inf")
        return last or time.monotonic() >= self._next

    def _report(self, step: int, loss: float) -> None:
        part = (self._before + step) / max(1, self._total * self._of)
        self._estimate.within(self._phase, min(1.0, part))
        self._update(step, loss)
        self._next = time.monotonic() + self.interval

    def _show(self, tasks: str) -> None:
        """A phase begins: draw it."""

    def _update(self, step: int, loss: float | None) -> None:
        """New numbers: draw them."""

    def _left(self) -> str:
        left = self._estimate.left()
        return "" if left is None else f"{clock(left)} left"


class Log(Display):
    """One line every ``interval`` seconds, for pipes and log files."""

    def __init__(self, stream: TextIO | None = None, interval: float = LOG_SECONDS) -> None:
        super().__init__()
        self.interval = interval
        self._stream = stream
        self._tasks = ""

    def start(self, layers: int, finished: int = 0) -> None:
        """A merge begins."""
        super().start(layers, finished)
        done = f", {finished} of them finished earlier" if finished else ""
        self._line(f"merging {layers} layer(s){done}")

    def layer_done(self) -> None:
        """The layer is finished and saved."""
        super().layer_done()
        self._line(f"{self._where()} | done | {self._left()}")

    def note(self, text: str) -> None:
        """Something the user should know."""
        self._line(f"note: {text}")

    def _show(self, tasks: str) -> None:
        self._tasks = tasks

    def _update(self, step: int, loss: float | None) -> None:
        if loss is None:
            self._line(f"{self._phase} {self._layer} | {step}/{self._total} tensors")
            return
        parts = [self._where(), f"{self._phase} {self._tasks}", f"{step}/{self._total}"]
        parts.append(f"loss {loss:.4f}")
        if self._cosine is not None:
            parts.append(f"mean cos {self._cosine:.3f}")
        parts.append(self._left())
        self._line(" | ".join(parts))

    def _where(self) -> str:
        return f"layer {self._index + 1}/{self._estimate.layers} {self._layer}"

    def _line(self, text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", file=self._stream or sys.stderr, flush=True)


class Terminal(Display):
    """Two bars that redraw in place: layers, and the phase of the current one."""

    interval = TERMINAL_SECONDS

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=console or Console(stderr=True),
            refresh_per_second=4,
            transient=True,
        )
        self._layers: TaskID | None = None
        self._steps: TaskID | None = None

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, layers: int, finished: int = 0) -> None:
        """A merge begins."""
        super().start(layers, finished)
        self._layers = self._bars.add_task("layers", total=layers, completed=finished, text="")

    def layer_done(self) -> None:
        """The layer is finished and saved."""
        super().layer_done()
        if self._layers is not None:
            self._bars.update(self._layers, completed=self._estimate.done, text=self._left())

    def end(self) -> None:
        """The phase is over."""
        super().end()
        self._bars.refresh()

    def note(self, text: str) -> None:
        """Something the user should know."""
        self._bars.console.print(f"[yellow]note:[/yellow] {escape(text)}", highlight=False)

    def _show(self, tasks: str) -> None:
        if self._layers is not None:
            text = escape(f"{self._layer} {self._left()}")
            self._bars.update(self._layers, text=text)
        if self._steps is None:
            self._steps = self._bars.add_task(self._phase, total=self._total, text="")
        self._bars.reset(
            self._steps,
            total=self._total,
            description=escape(f"{self._phase} {tasks}".strip()),
            text="",
        )
        self._bars.refresh()  # a phase shorter than the redraw interval is seen too

    def _update(self, step: int, loss: float | None) -> None:
        text = "" if loss is None else f"loss {loss:.4f}"
        if self._cosine is not None:
            text += f"  mean cos {self._cosine:.3f}"
        if self._layers is None:
            text += f"  {self._left()}"
        else:
            self._bars.update(self._layers, text=escape(f"{self._layer} {self._left()}"))
        assert self._steps is not None
        self._bars.update(self._steps, completed=step, text=text)


def display(enabled: bool = True) -> Display:
    """The display that fits: live on a terminal, lines elsewhere, silent when not enabled."""
    if not enabled:
        return Display()
    return Terminal() if sys.stderr.isatty() else Log()


@contextmanager
def step_bar(
    steps: int, n_terms: int, label: str = "construct"
) -> Iterator[Callable[[int, Tensor, Tensor], None]]:
    """A bar for one construction outside of a merge.

    Args:
        steps: how many there will be.
        n_terms: number P of parameter tensors in the loss, shown beside it.
        label: what runs.

    Yields:
        the callback for ``construct(on_step=...)``.
    """
    with display() as shown:
        shown.begin("construct", f"{label}, {n_terms} tensors", 0, steps, [])
        yield shown.on_step

"""From a merge's output folder to the page."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from fda_fast.errors import InputError
from fda_fast.report.analyses import analyse, choose_layers, without_checkpoints
from fda_fast.report.page import page
from fda_fast.report.plots import require_matplotlib
from fda_fast.report.results import Analyses
from fda_fast.report.run import PathLike, Run
from fda_fast.work import write_atomically


def write_report(
    run: PathLike,
    output: PathLike | None = None,
    *,
    pretrained: PathLike | None = None,
    experts: Mapping[str, PathLike] | None = None,
    texts: PathLike | Mapping[str, PathLike] | None = None,
    activations: PathLike | None = None,
    layers: str | None = None,
    device: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the report of a merge as one HTML file that loads nothing and runs no script.

    The record of the run alone gives cosines, losses, curves and settings. With the checkpoints,
    the construction of some layers is repeated (it is deterministic) for the spectrum over the
    run and the loss landscape; with texts or activations come subspace similarity, projection
    energy and representation bias. What is missing is said on the page.

    Args:
        run: folder that ``merge`` wrote.
        output: the page; default ``<run's name>-report.html`` here. An existing file is replaced.
        pretrained: folder of the base model.
        experts: folder of every expert by its name in the merge.
        texts: a file with one text a line, or one for each expert by name.
        activations: folder that ``save_activations`` wrote, in place of texts.
        layers: which to look at closely: names or numbers with commas between, "all" or "none";
            default the middle and the last one.
        device: "auto", "cpu", "cuda", "cuda:N".
        say: told what is being done, in a few words.

    Returns:
        Path of the page.

    Raises:
        InputError: matplotlib is missing, no run, checkpoints or experts that are not the run's,
            texts without checkpoints.
        OSError: the page cannot be written.

    Cost: without checkpoints seconds; with them the construction of the chosen layers again.
    """
    require_matplotlib()
    opened = Run.open(run)
    target = Path(output) if output is not None else Path(f"{opened.folder.name}-report.html")
    target = Path(os.path.abspath(target.expanduser()))
    if not target.parent.is_dir():
        raise InputError(f"output {target}", expected="a folder that exists")
    if target.is_dir():
        raise InputError(
            f"output {target}", expected="a file for the page", got="a folder",
            fix=f"Give a file in it, such as {target / 'report.html'}.",
        )  # fmt: skip
    analyses = _analyses(opened, pretrained, experts, texts, activations, layers, device, say)
    write_atomically(target, page(opened, analyses).encode())
    return target


def _analyses(
    run: Run,
    pretrained: PathLike | None,
    experts: Mapping[str, PathLike] | None,
    texts: PathLike | Mapping[str, PathLike] | None,
    activations: PathLike | None,
    layers: str | None,
    device: str,
    say: Callable[[str], None],
) -> Analyses:
    if pretrained is None or not experts:
        given = {"texts": texts, "activations": activations, "layers": layers}
        given |= {"pretrained": pretrained, "experts": experts}
        names = [name for name, value in given.items() if value]
        if names:
            lacking = "--pretrained" if pretrained is None else "--expert"
            raise InputError(
                f"the analyses that {names[0]} asks for need the checkpoints: {lacking} is missing",
                expected="--pretrained DIR and --expert NAME=DIR for every expert",
                got=", ".join(names),
            )
        return without_checkpoints(run)
    if run.settings.get("method") != "fda":
        raise InputError(
            f"{run.folder.name} was merged by {run.settings.get('method')}",
            expected="a merge by FDA, to analyse its anchors",
            fix="Leave the checkpoints out for a page of its settings.",
        )
    indices = choose_layers(run, layers)
    files = None
    if texts is not None:
        by_task = texts if isinstance(texts, Mapping) else dict.fromkeys(run.tasks, texts)
        unknown = [name for name in by_task if name not in run.tasks]
        if unknown:
            raise InputError(f"texts of {unknown[0]}", expected=", ".join(run.tasks))
        files = {name: Path(path) for name, path in by_task.items()}
    folder = None if activations is None else Path(activations)
    job = run.job(pretrained, experts, device)
    try:
        return analyse(run, job, indices=indices, texts=files, activations=folder, say=say)
    finally:
        job.close()

"""The command line: fda-fast merge | construct | adapt | plan | inspect | official | report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fda_fast.errors import InputError
from fda_fast.exits import INTERRUPTED, guarded
from fda_fast.version import __version__

app = typer.Typer(
    name="fda-fast",
    help="Merge fine-tuned models through Functional Dual Anchors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(help="YAML configuration, in the style of mergekit.")]
Output = Annotated[Path, typer.Argument(help="Output folder: new, or empty.")]
Steps = Annotated[int | None, typer.Option(help="Construction steps.")]
Epochs = Annotated[int | None, typer.Option(help="Adaptation epochs.")]
StartPoint = Annotated[
    str | None, typer.Option("--start", help="pretrained, task_arithmetic, tsv or wudi.")
]
PresetName = Annotated[str | None, typer.Option("--preset", help="Published settings by name.")]
Seed = Annotated[int | None, typer.Option(help="Of the anchors and of the shuffling.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any entry of 'parameters'; repeatable."),
]
Device = Annotated[
    str,
    typer.Option(help="auto, cpu, cuda, cuda:N; several, as cuda:0,cuda:1, share the layers."),
]
MaxMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Most memory to use, such as 6GiB.")
]
MaxGpuMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Most memory of the GPU to use.")
]
ShardOption = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Do part I of N of the layers, and write nothing."),
]
Assemble = Annotated[
    bool, typer.Option("--assemble", help="Write the output; all shards must be finished.")
]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="Share the layers with a Ray cluster; or local."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only errors.")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away the work of earlier runs.")]


def _overrides(
    assignments: list[str] | None = None, **given: int | float | str | None
) -> dict[str, Any]:
    """Command-line values for the configuration's ``parameters``."""
    import yaml

    found: dict[str, Any] = {}
    for assignment in assignments or []:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise InputError("--set", expected="KEY=VALUE", got=repr(assignment))
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[key.strip()] = value
    return found | {key: value for key, value in given.items() if value is not None}


def _resources(
    device: str,
    max_memory: str | None,
    max_gpu_memory: str | None,
    shard: str | None,
    assemble: bool,
    ray: str | None,
) -> Any:
    from fda_fast.resources import Resources

    return Resources.of(
        device,
        max_memory=max_memory,
        max_gpu_memory=max_gpu_memory,
        shard=shard,
        assemble=assemble,
        ray=ray,
    )


@app.command()
@guarded
def merge(
    config: ConfigFile,
    output: Output,
    steps: Steps = None,
    epochs: Epochs = None,
    start: StartPoint = None,
    preset: PresetName = None,
    seed: Seed = None,
    assignments: Assignments = None,
    device: Device = "auto",
    keep_anchors: Annotated[
        bool, typer.Option("--keep-anchors", help="Leave the anchors in OUTPUT/anchors.")
    ] = False,
    anchors_from: Annotated[
        Path | None,
        typer.Option(
            "--anchors-from",
            help="Finished anchors to use; only those of experts missing there are constructed.",
        ),
    ] = None,
    max_memory: MaxMemory = None,
    max_gpu_memory: MaxGpuMemory = None,
    shard: ShardOption = None,
    assemble: Assemble = False,
    ray: RayAddress = None,
    restart: Restart = False,
    quiet: Quiet = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="USER/NAME", help="Upload OUTPUT when it is done."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: a private repository.")
    ] = False,
) -> None:
    """Merge the models of CONFIG into OUTPUT; run again to go on after an interruption."""
    from fda_fast.config import load
    from fda_fast.merge import run
    from fda_fast.publish import destination

    overrides = _overrides(
        assignments, steps=steps, epochs=epochs, start=start, preset=preset, seed=seed
    )
    if private and push_to_hub is None:
        raise InputError("--private", expected="--push-to-hub USER/NAME with it")
    content = load(config, overrides)
    # Asked now: nobody wants to hear after hours of work that a token has expired.
    hub = None if push_to_hub is None else destination(push_to_hub, private=private)
    report = run(
        content,
        output,
        resources=_resources(device, max_memory, max_gpu_memory, shard, assemble, ray),
        restart=restart,
        keep_anchors=keep_anchors,
        anchors=anchors_from,
        progress=not quiet,
    )
    if not quiet:
        _print_report(report)
    if hub is not None and report.output.is_dir():
        typer.echo(hub.upload(report.output))


@app.command()
@guarded
def construct(
    config: ConfigFile,
    output: Annotated[Path, typer.Argument(help="Folder for the anchors: new, or empty.")],
    steps: Steps = None,
    preset: PresetName = None,
    seed: Seed = None,
    assignments: Assignments = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    max_gpu_memory: MaxGpuMemory = None,
    shard: ShardOption = None,
    assemble: Assemble = False,
    ray: RayAddress = None,
    restart: Restart = False,
    quiet: Quiet = False,
) -> None:
    """Construct the anchors alone, into OUTPUT/<expert>/<layer>.safetensors."""
    from fda_fast.config import load
    from fda_fast.merge import run

    report = run(
        load(config, _overrides(assignments, steps=steps, preset=preset, seed=seed)),
        output,
        mode="construct",
        resources=_resources(device, max_memory, max_gpu_memory, shard, assemble, ray),
        restart=restart,
        progress=not quiet,
    )
    if not quiet:
        _print_report(report)


@app.command()
@guarded
def adapt(
    config: ConfigFile,
    anchors: Annotated[Path, typer.Argument(help="Folder that `construct` wrote.")],
    output: Output,
    epochs: Epochs = None,
    start: StartPoint = None,
    preset: PresetName = None,
    seed: Seed = None,
    assignments: Assignments = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    max_gpu_memory: MaxGpuMemory = None,
    shard: ShardOption = None,
    assemble: Assemble = False,
    ray: RayAddress = None,
    restart: Restart = False,
    quiet: Quiet = False,
) -> None:
    """Adapt to finished ANCHORS and write the merged model to OUTPUT."""
    from fda_fast.config import load
    from fda_fast.merge import run

    report = run(
        load(
            config,
            _overrides(assignments, epochs=epochs, start=start, preset=preset, seed=seed),
        ),
        output,
        mode="adapt",
        anchors=anchors,
        resources=_resources(device, max_memory, max_gpu_memory, shard, assemble, ray),
        restart=restart,
        progress=not quiet,
    )
    if not quiet:
        _print_report(report)


@app.command()
@guarded
def plan(
    config: Annotated[
        Path,
        typer.Argument(help="YAML configuration; or a model's config.json, or its folder."),
    ],
    output: Annotated[
        Path | None, typer.Argument(help="Output folder, to check it and its disk too.")
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="Experts, with a model's config.json.", show_default="2")
    ] = None,
    steps: Steps = None,
    epochs: Epochs = None,
    start: StartPoint = None,
    preset: PresetName = None,
    seed: Seed = None,
    assignments: Assignments = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    max_gpu_memory: MaxGpuMemory = None,
) -> None:
    """Check everything and say what a merge would take, without reading the weights."""
    from fda_fast.planning import plan_path
    from fda_fast.reporting import console, plan_view

    overrides = _overrides(
        assignments, steps=steps, epochs=epochs, start=start, preset=preset, seed=seed
    )
    resources = _resources(device, max_memory, max_gpu_memory, None, False, None)
    found = plan_path(config, output, overrides, experts=experts, resources=resources)
    console().print(plan_view(found))


@app.command()
@guarded
def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="A checkpoint, an anchors file or folder, or a work directory."),
    ],
) -> None:
    """Show what a checkpoint, an anchors file or a work directory holds."""
    from fda_fast.inspection import show

    show(path)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
@guarded
def official(context: typer.Context) -> None:
    """The published FDA scripts: vision|nlu|nlg construct|adapt, then their own flags."""
    from fda_fast.compat.official.commands import main as run

    raise typer.Exit(run(context.args))


@app.command()
@guarded
def report(
    run: Annotated[Path, typer.Argument(help="Folder that `merge` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; default RUN-report.html here.")
    ] = None,
    pretrained: Annotated[Path | None, typer.Option(help="Folder of the base model.")] = None,
    expert: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="An expert; repeat for each.")
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="Texts, one a line: of all experts, or of one."),
    ] = None,
    activations: Annotated[
        Path | None, typer.Option(help="Folder of real activations, in place of texts.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to look at closely: all, none, or numbers with commas between."),
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about a merge: its losses, its anchors, how near it is to the experts."""
    from fda_fast.report.write import write_report

    files = _named("--texts", texts) if any("=" in text for text in texts or []) else None
    if files is None and texts and len(texts) > 1:
        raise InputError("--texts", expected="one FILE, or NAME=FILE for each expert", got=texts)
    written = write_report(
        run,
        output,
        pretrained=pretrained,
        experts=_named("--expert", expert),
        texts=files or (texts[0] if texts else None),
        activations=activations,
        layers=layers,
        device=device,
        say=lambda text: None if quiet else typer.echo(text, err=True),
    )
    typer.echo(f"written: {written}")


def _named(option: str, pairs: list[str] | None) -> dict[str, str]:
    """NAME=VALUE arguments of a repeatable option."""
    found: dict[str, str] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not (name and equals and value) or name in found:
            raise InputError(option, expected="NAME=PATH, each name once", got=repr(pair))
        found[name] = value
    return found


def _print_report(report: Any) -> None:
    from fda_fast.reporting import console, table

    console().print(table(report))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fda-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Merge fine-tuned models through Functional Dual Anchors."""


def main() -> None:
    """The ``fda-fast`` command."""
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun, while packages load
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()

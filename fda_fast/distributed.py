"""The layers of a merge as Ray tasks: on this machine's cores, or on many machines.

The driver alone writes the work directory. A task does one layer in a temporary directory of its
worker, with the code that a serial merge uses, and the files it made come back through Ray's object
store; so the files are the same, and a driver that is killed goes on like any merge. Where the
experts of a layer make several batches, each is constructed by a task of its own first. A task
whose worker dies is run again elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fda_fast.config import MergeConfig, parse
from fda_fast.errors import InputError
from fda_fast.layerwork import LayerResult
from fda_fast.progress import Display
from fda_fast.settings import Settings
from fda_fast.work import WorkDirectory, file_name, write_atomically

if TYPE_CHECKING:
    from fda_fast.job import Job
    from fda_fast.resources import Resources

RETRIES = 3
_MAX_JOBS = 2
Files = dict[str, bytes]


@dataclass(frozen=True)
class Order:
    """A merge, as workers are told of it.

    Attributes:
        config: the merge.
        settings: as the driver resolved them.
        mode, source: as ``pipeline.process_layers``.
        device: "cpu" or "cuda".
        batch: tasks constructed in one batch.
        part: anchors of a task that a step holds at once, None for all.
        threads: of a worker; their number can change the last bits of a product.
        max_memory, max_gpu_memory: limits of a worker.
        identity: digest of what decides the result: a worker must see the same.
    """

    config: dict[str, Any]
    settings: Settings
    mode: str
    source: str | None
    device: str
    batch: int
    part: int | None
    threads: int
    max_memory: int | None
    max_gpu_memory: int | None
    identity: str


@dataclass(frozen=True)
class Parcel:
    """One task: a layer, or the construction of one batch of its experts.

    Attributes:
        index: of the layer.
        group: the experts to construct; None does the whole layer.
        files: finished anchors, by path in the work directory.
    """

    index: int
    group: tuple[str, ...] | None
    files: Files


def process_layers(
    job: Job,
    work: WorkDirectory,
    indices: Sequence[int],
    display: Display,
    resources: Resources,
    *,
    mode: str = "merge",
    source: Path | None = None,
) -> tuple[dict[int, LayerResult], float]:
    """Bring layers to their end on a Ray cluster.

    Args:
        job: the merge; its checkpoints are at the same paths on every machine.
        work: where finished work is and goes.
        indices: of layers that are not finished.
        display: shows progress.
        resources: gives the cluster's address ("local" starts one here) and a worker's limits.
        mode, source: as ``pipeline.process_layers``.

    Returns:
        Results by index, and 0.0 in the place of seconds waited.

    Raises:
        InputError: whatever a task finds wrong with the inputs.
        RuntimeError: a task whose workers died again and again.
    """
    import ray  # an extra, which Resources.of has seen to be there

    order = ray_order(job, work, resources, mode, source)
    started = not ray.is_initialized()
    if started:
        address = None if resources.ray == "local" else resources.ray
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    running: dict[Any, Parcel] = {}
    try:
        return _drive(ray, job, work, indices, display, order, running), 0.0
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        raise (cause if isinstance(cause, Exception) else error) from None
    except ray.exceptions.RayError as error:
        reason = str(error).strip().split("\n")[0]
        kept = " Finished work is kept." if work.has_finished() else ""
        raise RuntimeError(f"Ray gave up: {reason}{kept}") from error
    finally:
        for reference in running:  # a cluster that was there before may outlive this merge
            ray.cancel(reference, force=True)
        if started:
            ray.shutdown()


def ray_order(
    job: Job, work: WorkDirectory, resources: Resources, mode: str, source: Path | None
) -> Order:
    """What workers are told of a merge."""
    return Order(
        config=_dump(job.config),
        settings=job.settings,
        mode=mode,
        source=None if source is None else str(source.absolute()),
        device=job.device.type,
        batch=work.batch,
        part=work.part,
        threads=torch.get_num_threads(),
        max_memory=resources.max_memory,
        max_gpu_memory=resources.max_gpu_memory,
        identity=_digest(job),
    )


def _drive(
    ray: Any,
    job: Job,
    work: WorkDirectory,
    indices: Sequence[int],
    display: Display,
    order: Order,
    running: dict[Any, Parcel],
) -> dict[int, LayerResult]:
    gpus = 1 if order.device == "cuda" else 0
    remote = ray.remote(num_cpus=order.threads, num_gpus=gpus, max_retries=RETRIES)(do_parcel)
    told = ray.put(order)
    waiting = deque(parcel for index in indices for parcel in _parcels(job, work, index, order))
    groups = {i: sum(p.index == i and p.group is not None for p in waiting) for i in indices}
    done: dict[int, LayerResult] = {}
    while waiting or running:
        # No more at once than can run, and a few: results wait in the object store meanwhile.
        while waiting and len(running) < _at_once(ray, order):
            parcel = waiting.popleft()
            running[remote.remote(told, parcel)] = parcel
        ready, _ = ray.wait(list(running), num_returns=1)
        parcel = running.pop(ready[0])
        files, seconds = ray.get(ready[0])
        _store(work, files)
        spec = job.layers[parcel.index]
        if parcel.group is None:
            result = LayerResult.from_record(work.load_record(spec.name))
            result.seconds.update(seconds)
            done[parcel.index] = result
            display.begin("layer", spec.name, parcel.index, 1, list(job.experts))
            display.layer_done()
            continue
        groups[parcel.index] -= 1
        if not groups[parcel.index]:
            whole = Parcel(parcel.index, None, _anchors(job, work, parcel.index))
            waiting.appendleft(whole)
    return done


def _at_once(ray: Any, order: Order) -> int:
    available = ray.cluster_resources()
    slots = available.get("CPU", 1) // max(1, order.threads)
    if order.device == "cuda":
        slots = min(slots, available.get("GPU", 1))
    return max(1, int(slots)) + 2


def _parcels(job: Job, work: WorkDirectory, index: int, order: Order) -> list[Parcel]:
    """The tasks that a layer begins with: one for every batch of experts, or one for all of it."""
    there = _anchors(job, work, index)
    tasks = list(job.experts)
    groups = [tasks[i : i + order.batch] for i in range(0, len(tasks), order.batch)]
    name = file_name(job.layers[index].name)
    missing = [
        group
        for group in groups
        if any(f"anchors/{file_name(task)}/{name}.safetensors" not in there for task in group)
    ]
    apart = order.source is None and job.settings.optimises and len(missing) > 1
    if not apart:
        return [Parcel(index, None, there)]
    return [Parcel(index, tuple(group), {}) for group in missing]


def _anchors(job: Job, work: WorkDirectory, index: int) -> Files:
    """The finished anchors of a layer."""
    name = f"{file_name(job.layers[index].name)}.safetensors"
    paths = [work.path / "anchors" / file_name(task) / name for task in job.experts]
    return {str(p.relative_to(work.path)): p.read_bytes() for p in paths if p.exists()}


def _store(work: WorkDirectory, files: Mapping[str, bytes]) -> None:
    """Write what a task made; a layer's own file last, for it says that the layer is finished."""
    for name in sorted(files, key=lambda name: (name.startswith("layers/"), Path(name).suffix)):
        path = work.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, files[name])


_jobs: dict[str, Job] = {}


def do_parcel(order: Order, parcel: Parcel) -> tuple[Files, dict[str, float]]:
    """One task, in a worker.

    Returns:
        The files it made, by path in the work directory, and seconds by phase.
    """
    from fda_fast.pipeline import process_layer

    begun = time.monotonic()
    job, mode = _prepared(order), order.mode
    if parcel.group is not None:
        job = replace(job, experts={task: job.experts[task] for task in parcel.group})
        mode = "construct"
    with tempfile.TemporaryDirectory(prefix="fda-") as folder:
        work = WorkDirectory(Path(folder) / "merge")
        work.batch, work.part = order.batch, order.part
        for name in ("anchors", "layers"):
            (work.path / name).mkdir(parents=True)
        _store(work, parcel.files)
        result = process_layer(
            job,
            work,
            parcel.index,
            Display(),
            mode=mode,
            source=None if order.source is None else Path(order.source),
        )
        wanted = "anchors" if parcel.group is not None else "*"
        files = {
            str(path.relative_to(work.path)): path.read_bytes()
            for path in work.path.glob(f"{wanted}/**/*")
            if path.is_file()
        }
    made = {name: content for name, content in files.items() if name not in parcel.files}
    spent = dict(result.seconds)
    spent["prepare"] = time.monotonic() - begun - sum(spent.values())
    return made, spent


def _prepared(order: Order) -> Job:
    """The job, opened once per worker process and merge."""
    from fda_fast.budget import enforce
    from fda_fast.job import prepare

    if order.identity not in _jobs:
        torch.set_num_threads(order.threads)
        job = prepare(parse(order.config, where="merge"), order.device)
        job.settings = order.settings
        if _digest(job) != order.identity:
            raise InputError(
                "a Ray worker would compute something else than the driver",
                expected="the same files, versions and backends on every machine",
                got="other ones",
            )
        enforce(job, order.max_memory, order.max_gpu_memory)
        while len(_jobs) >= _MAX_JOBS:
            _jobs.pop(next(iter(_jobs))).close()
        _jobs[order.identity] = job
    return _jobs[order.identity]


def _dump(config: MergeConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_none=True, exclude_defaults=True)


def _digest(job: Job) -> str:
    text = json.dumps(job.identity("ray"), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()

"""Hostile pickles: nothing in them runs, whatever they ask for costs little, errors are clear.

Every file is opened in a process of its own (``pickle_target``) with an audit hook for running,
importing and writing, and with a limit on its memory.
"""

from __future__ import annotations

import json
import lzma
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

TARGET = Path(__file__).with_name("pickle_target.py")
PEAK = 900 << 20  # the libraries themselves take 300 to 500 MB
SECONDS = 20.0  # of one file on a busy machine


def run_target(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, str(TARGET), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


# Building blocks: opcodes, and the three containers around a pickle.


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    content = value.to_bytes(16, "little", signed=True)
    return b"\x8a\x10" + content


def ref(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return ref(module, name) + b"(" + b"".join(arguments) + b"tR"


def dump(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def state(value: bytes) -> bytes:
    """A state dict {"a": value}."""
    return b"}" + text("a") + value + b"s"


def zipped(path: Path, content: bytes, members: dict[str, bytes] | None = None) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in (members or {}).items():
            archive.writestr(f"archive/{name}", data)


def raw_bytes(content: bytes, keys: tuple[str, ...] = (), data: bytes = b"") -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, system)]
    return b"".join(head) + content + pickle.dumps(list(keys), 2) + data


def raw(path: Path, content: bytes, keys: tuple[str, ...] = (), data: bytes = b"") -> None:
    path.write_bytes(raw_bytes(content, keys, data))


def npy(path: Path, content: bytes) -> None:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    header += b" " * (117 - len(header)) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content)


CONTAINERS: dict[str, Callable[[Path, bytes], None]] = {
    ".zip.pt": zipped,
    ".raw.pt": raw,
    ".plain.pkl": lambda path, content: path.write_bytes(content),
    ".npy": npy,
}


def storage(numel: int, key: str = "0", kind: str = "FloatStorage", extra: bytes = b"") -> bytes:
    """A persistent reference to a storage."""
    parts = (text("storage"), ref("torch", kind), text(key), text("cpu"), number(numel), extra)
    return b"(" + b"".join(parts) + b"tQ"


def tensor(
    stored: bytes,
    shape: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    start: int = 0,
) -> bytes:
    sizes = [b"(" + b"".join(map(number, value)) + b"t" for value in (shape, stride)]
    hooks = call("collections", "OrderedDict")
    return call("torch._utils", "_rebuild_tensor_v2", stored, number(start), *sizes, b"\x89", hooks)


# Code that would run. Each ends in a canary file if it does.

SHELL = text("touch canary")
PYTHON = text("open('canary', 'w')")
TOUCH = text("canary")


def storage_bytes() -> bytes:
    """A raw file as torch.storage._load_from_bytes takes it, whose pickle calls os.system."""
    return raw_bytes(dump(call("os", "system", SHELL)))


def honest_storage() -> bytes:
    """A raw file of four numbers, as in_bytes takes it."""
    content = dump(storage(4, extra=b"N"))
    return raw_bytes(content, ("0",), struct.pack("<q", 4) + bytes(16))


def in_bytes(content: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(content)) + content


def dotted(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


CODE: dict[str, tuple[bytes, str]] = {
    "os.system": (call("os", "system", SHELL), "os.system"),
    "posix.system": (call("posix", "system", SHELL), "posix.system"),
    "subprocess": (call("subprocess", "check_output", SHELL), "subprocess.check_output"),
    "eval": (call("builtins", "eval", PYTHON), "builtins.eval"),
    "eval of Python 2": (call("__builtin__", "eval", PYTHON), "builtins.eval"),
    "exec": (call("builtins", "exec", PYTHON), "builtins.exec"),
    "open": (call("builtins", "open", TOUCH, text("w")), "builtins.open"),
    "import": (call("builtins", "__import__", text("antigravity")), "builtins.__import__"),
    "getattr": (
        call("builtins", "getattr", ref("builtins", "int"), text("__class__")),
        "builtins.getattr",
    ),
    "getattr on a module record": (
        call("builtins", "getattr", ref("torch.nn", "Module"), text("__reduce__")),
        "builtins.getattr",
    ),
    "dotted name through an allowed class": (
        dotted("collections", "OrderedDict.__init__.__globals__") + b")R",
        "collections.OrderedDict.__init__.__globals__",
    ),
    "dotted name through a library": (
        dotted("torch.nn.modules", "os.system") + b"(" + SHELL + b"tR",
        "torch.nn.modules.os.system",
    ),
    "library's own import of os": (
        call("open_clip.factory", "os.system", SHELL),
        "open_clip.factory.os.system",
    ),
    "library function": (
        call("open_clip.factory", "create_model", text("x")),
        "open_clip.factory.create_model",
    ),
    "torch.load": (call("torch.serialization", "load", TOUCH), "torch.serialization.load"),
    "torch.hub": (call("torch.hub", "load", text("a/b")), "torch.hub.load"),
    "torch.jit": (call("torch.jit", "load", TOUCH), "torch.jit.load"),
    "numpy.load": (call("numpy", "load", TOUCH), "numpy.load"),
    "runpy": (call("runpy", "run_path", TOUCH), "runpy.run_path"),
    "pickle.loads": (call("pickle", "loads", in_bytes(b"N.")), "pickle.loads"),
    "codecs": (call("_codecs", "decode", TOUCH), "_codecs.decode"),
    "partial of os.system, called": (
        call("functools", "partial", ref("os", "system")) + b"(" + SHELL + b"tR",
        "os.system",
    ),
    "partial of a library function, called": (
        call("functools", "partial", ref("torch.nn.functional", "gelu")) + b")R",
        "functools.partial",
    ),
    "partial with a state of os.system": (
        call("functools", "partial", ref("torch.nn.functional", "gelu"))
        + b"("
        + ref("os", "system")
        + b"(ttb",
        "os.system",
    ),
    "record, called": (ref("torch.nn", "Module") + b")\x81)R", "torch.nn.Module"),
    "class of nn called with code": (
        call("torch.nn", "Module", ref("os", "system")),
        "os.system",
    ),
    "class of nn called": (call("torch.nn", "Linear", number(2), number(2)), "torch.nn.Linear"),
    "instance of another class": (ref("os", "_wrap_close") + b")\x81", "os._wrap_close"),
    "instance of Popen": (ref("subprocess", "Popen") + b")\x81", "subprocess.Popen"),
    "instance of a list": (ref("builtins", "list") + b")\x81", "builtins.list"),
    "__setstate__ of another class": (
        ref("multiprocessing.managers", "BaseManager") + b")\x81}b",
        "multiprocessing.managers.BaseManager",
    ),
    "__setstate__ named in a state": (
        ref("torch.nn", "Module")
        + b")\x81}"
        + text("__setstate__")
        + ref("os", "system")
        + b"sb"
        + SHELL
        + b"b",
        "os.system",
    ),
    "copyreg of another class": (
        call("copy_reg", "_reconstructor", ref("io", "FileIO"), ref("builtins", "object"), b"N"),
        "io.FileIO",
    ),
    "INST": (b"(" + SHELL + b"ios\nsystem\n", "os.system"),
    "OBJ": (b"(" + ref("os", "system") + SHELL + b"o", "os.system"),
    "OBJ of a library": (b"(" + ref("torch.nn", "Linear") + SHELL + b"o", "torch.nn.Linear"),
    "NEWOBJ_EX": (ref("subprocess", "Popen") + b")}\x92", "subprocess.Popen"),
    "extension code": (b"\x82\x01", "extension code"),
    "extension code of 4 bytes": (b"\x84\x01\x00\x00\x00", "extension code"),
    "hooks of a parameter": (
        call(
            "torch._utils",
            "_rebuild_parameter",
            call("os", "system", SHELL),
            b"\x88",
            call("collections", "OrderedDict"),
        ),
        "os.system",
    ),
    "type of a tensor": (
        call("torch._tensor", "_rebuild_from_type_v2", ref("os", "system"), SHELL, b")", b"N"),
        "os.system",
    ),
    "tensor from a function": (
        call(
            "torch._tensor",
            "_rebuild_from_type_v2",
            ref("torch.nn.functional", "gelu"),
            ref("torch", "Tensor"),
            b")",
            b"N",
        ),
        "another function",
    ),
    "tensor from a function, nested": (
        call(
            "torch._tensor",
            "_rebuild_from_type_v2",
            ref("torch._tensor", "_rebuild_from_type_v2"),
            ref("torch", "Tensor"),
            b")",
            b"N",
        ),
        "another function",
    ),
    "defaultdict's factory": (
        call("collections", "defaultdict", ref("os", "getcwd")),
        "os.getcwd",
    ),
    "storage in bytes": (
        call("torch.storage", "_load_from_bytes", in_bytes(storage_bytes())),
        "os.system",
    ),
    "array of objects": (
        call(
            "numpy.core.multiarray",
            "_reconstruct",
            ref("numpy", "ndarray"),
            b"(K\x00t",
            call("os", "system", SHELL),
        ),
        "os.system",
    ),
    "array of another class": (
        call("numpy.core.multiarray", "_reconstruct", ref("os", "stat_result"), b"(K\x00t", b"N"),
        "os.stat_result",
    ),
    "name with spaces": (ref("os ; touch canary", "x"), "os ; touch canary"),
    "name beyond ASCII": (ref("\uff4fs", "system"), r"\\uff4fs"),
    "name that is no text": (b"K\x01K\x02\x93", "no text"),
}


def code_files(folder: Path) -> dict[str, str]:
    """{file name: what its refusal must say}: every case in every container, at two depths."""
    expected = {}
    for index, (body, message) in enumerate(CODE.values()):
        for depth, wrapped in enumerate((body, state(b"]" + body + b"a"))):
            for suffix, write in CONTAINERS.items():
                name = f"{index}-{depth}{suffix}"
                write(folder / name, dump(wrapped, 4))
                expected[name] = message
    return expected


def test_no_code_runs(results: Results) -> None:
    assert len(results["code"]) > 300
    for result in results["code"]:
        assert result["outcome"] == "refused", result
        assert result["expected"].replace("\\\\", "\\") in result["message"], result


def test_nothing_happens_at_all(results: Results) -> None:
    for result in (r for group in results.values() for r in group):
        assert not result["events"], result
        assert not result["modules"], result
        assert not result["canary"], result
        assert result["seconds"] < SECONDS, result
        assert result["peak"] < PEAK, result


class Evil:
    """Makes the canary when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


def test_the_watch_would_tell(tmp_path: Path) -> None:
    # The same watch over torch's own loader, unrestricted: events, a canary.
    torch.save(Evil(), tmp_path / "evil.pt")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(TARGET.parent)!r})\n"
        "import pickle_target as t, torch\n"
        "t.use = lambda path: str(torch.load(path, weights_only=False))\n"
        "t.main()\n"
    )
    done = subprocess.run(
        [sys.executable, script, "open", "evil.pt"], cwd=tmp_path, capture_output=True, text=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert any(event.startswith("os.system") for event in result["events"])
    assert (tmp_path / "canary").exists()


# Files whose parts do not fit together.


FOUR = {"data/0": bytes(16)}
BROKEN: dict[str, tuple[bytes, str]] = {
    "storage smaller than it says": (tensor(storage(5)), "5 elements"),
    "storage larger than it says": (tensor(storage(3), (3,)), "3 elements"),
    "storage of another type": (tensor(storage(4, kind="DoubleStorage")), "float64"),
    "storage that is not there": (tensor(storage(4, key="1")), "not in the file"),
    "storage with a path as key": (tensor(storage(4, key="../data.pkl")), "not in the file"),
    "storage of a negative size": (tensor(storage(-4)), "without key or size"),
    "storage of 2^61 elements": (tensor(storage(1 << 61)), "elements"),
    "storage of 2^70 elements": (tensor(storage(1 << 70)), "without key or size"),
    "tensor beyond its storage": (tensor(storage(4), (5,)), "5"),
    "tensor that starts beyond": (tensor(storage(4), start=1), "element 1"),
    "tensor that starts before": (tensor(storage(4), start=-1), "element -1"),
    "negative size": (tensor(storage(4), (-1,)), "shape"),
    "negative stride": (tensor(storage(4), (2,), (-1,)), "strides"),
    "strides beyond": (tensor(storage(4), (2,), (1 << 40,)), "1099511627776"),
    "overflowing product": (tensor(storage(4), (1 << 40, 1 << 40), (0, 0)), "shape"),
    "overflow behind a zero": (tensor(storage(4), (0, 1 << 61, 4), (1, 1, 1)), "shape"),
    "strides of 0 that fill the memory": (tensor(storage(4), (1 << 40,), (0,)), "1099511627776"),
    "sizes and strides of different length": (tensor(storage(4), (2, 2), (1,)), "strides"),
    "65 dimensions": (tensor(storage(4), (1,) * 65, (1,) * 65), "shape"),
    "tensor of a list": (tensor(b"]"), "else than a storage"),
    "persistent id of a list": (b"]Q", "reference to"),
    "persistent id of another kind": (b"(" + text("module") + b"NNNNtQ", "else than a storage"),
    "persistent id with a dtype as type": (
        b"(" + text("storage") + ref("torch", "float32") + text("0") + b"NK\x04tQ",
        "else than a storage",
    ),
    "persistent id as text": (b"Pstorage\n", "reference to"),
    "empty": (b"", "no single object"),
    "stack underflow": (b"0", "mark"),
    "reduce without arguments": (b"R", "empty stack"),
    "reduce of numbers": (b"K\x01K\x01R", "a call of"),
    "arguments that are a list": (ref("torch", "Size") + b"]R", "arguments"),
    "build of nothing": (b"b", "empty stack"),
    "build of a tensor": (tensor(storage(4)) + b"}b", "state for a Tensor"),
    "build of a number": (b"K\x01}b", "state for"),
    "two states": (ref("torch.nn", "Module") + b")\x81}b}b", "second state"),
    "state with a number as name": (ref("torch.nn", "Module") + b")\x81}K\x01Nsb", "attribute"),
    "tuple of more than there is": (b"K\x01\x87", "empty stack"),
    "mark that is not there": (b"t", "mark"),
    "mark left open": (b"(N", "no single object"),
    "memo that is not there": (b"h\x07", "object 7"),
    "append to a number": (b"K\x01K\x02a", "appending"),
    "item of a list": (b"]K\x01K\x02s", "setting items"),
    "item of a module": (ref("torch.nn", "Module") + b")\x81K\x01K\x02s", "setting items"),
    "odd number of items": (b"}(K\x01u", "key without"),
    "key that is a list": (b"}]Ns", "a key"),
    "key that is a tuple": (b"})Ns", "a key"),
    "unknown opcode": (b"\xff", "0xff"),
    "text that is not UTF-8": (b"X\x01\x00\x00\x00\xff", "UnicodeDecodeError"),
    "text longer than the file": (b"X\xff\xff\xff\x7f", "are left"),
    "text of 2^63 bytes": (b"\x8d" + b"\xff" * 8, "are left"),
    "bytes of 2^63 bytes": (b"\x8e" + b"\xff" * 8, "are left"),
    "bytearray of 2^62 bytes": (b"\x96" + struct.pack("<Q", 1 << 62), "are left"),
    "integer of 2 GB": (b"\x8b\xff\xff\xff\x7f", "integer"),
    "integer of a negative length": (b"\x8b\xff\xff\xff\xff", "integer"),
    "decimal of 100 digits": (b"L" + b"9" * 100 + b"\n", "a line"),
    "line that does not end": (b"V" + b"a" * 70000, "a line"),
    "escapes of Python 2": (b"S'\\x41'\n", "escapes"),
    "buffer outside": (b"\x97", "buffer"),
    "quantised tensor": (call("torch._utils", "_rebuild_qtensor"), "quantised"),
    "array of text": (call("numpy", "dtype", text("U10"), b"\x89", b"\x88"), "dtype"),
    "array of fields": (
        call("numpy", "dtype", text("f4"), b"\x89", b"\x88")
        + b"(K\x03"
        + text("|")
        + b"N)NJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
        "fields",
    ),
    "array larger than its bytes": (
        call("numpy.core.multiarray", "_reconstruct", ref("numpy", "ndarray"), b"(K\x00t", b"N")
        + b"(K\x01("
        + number(1 << 50)
        + b"t"
        + call("numpy", "dtype", text("f4"), b"\x89", b"\x88")
        + b"\x89C\x04\x00\x00\x00\x00tb",
        "another size",
    ),
    "storage in bytes, cut off": (
        call("torch.storage", "_load_from_bytes", in_bytes(storage_bytes()[:40])),
        "left",
    ),
}


def broken_files(folder: Path) -> dict[str, str]:
    for index, (body, _) in enumerate(BROKEN.values()):
        zipped(folder / f"{index}.pt", dump(body, 4), FOUR)
    return {f"{index}.pt": message for index, (_, message) in enumerate(BROKEN.values())}


def test_parts_that_do_not_fit(results: Results) -> None:
    for result in results["broken"]:
        assert result["outcome"] == "refused", result
        assert result["expected"] in result["message"], result


def view_files(tmp_path: Path) -> dict[str, str]:
    """Views of storages in the format before torch 1.6."""

    def view(offset: int, size: int) -> bytes:
        return b"(" + text("view") + number(offset) + number(size) + b"t"

    cases = {
        "good.pt": (storage(4, extra=view(1, 3)), 4, "1 tensors"),
        "beyond.pt": (storage(4, extra=view(2, 3)), 4, "view beyond"),
        "before.pt": (storage(4, extra=view(-1, 3)), 4, "no range"),
        "huge.pt": (storage(1 << 40, extra=view(0, 3)), 1 << 40, "are left"),
        "other.pt": (storage(4, extra=b"N"), 5, "another size"),
        "negative.pt": (storage(4, extra=b"N"), -4, "another size"),
    }
    for name, (stored, numel, _) in cases.items():
        data = struct.pack("<q", numel) + bytes(16)
        raw(tmp_path / name, dump(state(tensor(stored, (3,)))), ("0",), data)
    raw(tmp_path / "twice.pt", dump(state(tensor(storage(4, extra=b"N"), (3,)))), ("0", "0"), data)
    raw(tmp_path / "none.pt", dump(state(tensor(storage(4, extra=b"N"), (3,)))))
    messages = {name: message for name, (_, _, message) in cases.items()}
    return messages | {"twice.pt": "another size", "none.pt": "not in the file"}


def test_views_of_old_storages(results: Results) -> None:
    for result in results["views"]:
        assert result["expected"] in result["message"], result
        assert result["outcome"] == ("used" if result["file"] == "good.pt" else "refused")


# Zips that are not what torch.save writes.


def zip_files(tmp_path: Path) -> dict[str, str]:
    good = dump(state(tensor(storage(4))))

    def archive(name: str, *entries: tuple[str, bytes, int]) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w") as target:
            for member, data, method in entries:
                target.writestr(member, data, compress_type=method)
        return tmp_path / name

    stored, packed = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
    pickled, data = ("a/data.pkl", good, stored), ("a/data/0", bytes(16), stored)
    expected = {"good.pt": "1 tensors", "comment.pt": "comment", "bomb.pt": "compressed"}
    archive("good.pt", pickled, data)
    # 200 MB of zeros in 200 KB.
    archive("bomb.pt", pickled, ("a/data/0", bytes(200 << 20), packed))
    archive("bomb_pickle.pt", ("a/data.pkl", good + bytes(50 << 20), packed), data)
    expected["bomb_pickle.pt"] = "compressed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive("twice.pt", pickled, data, data)
    expected["twice.pt"] = "two members"
    archive("two_pickles.pt", pickled, data, ("b/data.pkl", good, stored))
    expected["two_pickles.pt"] = "2 members"
    archive("no_pickle.pt", data)
    expected["no_pickle.pt"] = "0 members"
    archive("script.pt", pickled, data, ("a/constants.pkl", good, stored))
    expected["script.pt"] = "TorchScript"
    archive("big_endian.pt", pickled, data, ("a/byteorder", b"big", stored))
    expected["big_endian.pt"] = "big-endian"
    with zipfile.ZipFile(archive("comment.pt", pickled, data), "a") as target:
        target.comment = b"x" * 100
    content = (tmp_path / "good.pt").read_bytes()
    end = content.rindex(b"PK\x05\x06")
    central = content.index(b"PK\x01\x02")

    def patched(name: str, message: str, at: int, value: bytes) -> None:
        (tmp_path / name).write_bytes(content[:at] + value + content[at + len(value) :])
        expected[name] = message

    patched("many.pt", "broken zip", end + 8, struct.pack("<HH", 60000, 60000))
    patched("few.pt", "another size", end + 8, struct.pack("<HH", 1, 1))
    patched("disks.pt", "several parts", end + 4, b"\x01")
    patched("far.pt", "broken zip", end + 16, struct.pack("<I", 1 << 31))
    patched("wide.pt", "broken zip", end + 12, struct.pack("<I", 1 << 31))
    patched("flag.pt", "encrypted", central + 8, b"\x01")
    patched("method.pt", "compressed", central + 10, b"\x08")
    patched("size.pt", "compressed", central + 24, b"\xff")
    patched("header.pt", "not where", central + 42, b"\x05")
    patched("local_name.pt", "another name", 30, b"b")
    second = content.index(b"PK\x01\x02", central + 4)
    longer = struct.pack("<I", len(good) + 1)
    patched("overlap.pt", "overlaps", central + 20, longer * 2)
    patched("same_place.pt", "another name", second + 42, bytes(4))
    return expected


def test_zips(results: Results) -> None:
    for result in results["zips"]:
        wanted = result["expected"].split("|")
        assert any(part in result["message"] for part in wanted), result
        assert result["outcome"] == ("used" if result["file"] == "good.pt" else "refused")


# Small files that ask for much.


def module_of(body: bytes) -> bytes:
    """A module whose sub-modules are the dict ``body``."""
    parts = text("_parameters") + b"}s" + text("_buffers") + b"}s" + text("_modules") + body + b"s"
    return ref("torch.nn.modules.container", "ModuleList") + b")\x81}" + parts + b"b"


def doubling(levels: int) -> bytes:
    """Modules of which each contains the next twice."""
    body = module_of(b"}")
    for level in range(levels):
        index = bytes([level])
        body += b"q" + index + b"0"
        twice = b"}" + text("a") + b"h" + index + b"s" + text("b") + b"h" + index + b"s"
        body += module_of(twice)
    return body


BOMBS: dict[str, tuple[bytes, str]] = {
    "millions of dicts": (b"(" + b"}" * 2_500_000 + b"t", "too large"),
    "a list referred to millions of times": (b"]q\x00(" + b"h\x00" * 2_100_000 + b"t", "too large"),
    "sets of a long list, over and over": (
        b"](" + b"K\x01" * 100_000 + b"eq\x000]" + (ref("builtins", "set") + b"h\x00\x85Ra") * 9999,
        "too large",
    ),
    "dicts of a long list, over and over": (
        b"](" + b")" * 100_000 + b"eq\x000]" + call("collections", "OrderedDict", b"h\x00") * 2,
        "else than pairs",
    ),
    "long text encoded, over and over": (
        text("a" * 1_000_000)
        + b"q\x000]"
        + (ref("_codecs", "encode") + b"(h\x00" + text("latin1") + b"tRa") * 5000,
        "too large",
    ),
    "one storage in bytes, over and over": (
        in_bytes(honest_storage())
        + b"q\x000]"
        + (ref("torch.storage", "_load_from_bytes") + b"h\x00\x85Ra") * 60_000,
        "too large",
    ),
    "lists nested 300,000 deep": (b"]" * 300_000 + b"a" * 299_999, "a list"),
    "tuples nested 300,000 deep": (b")" + b"\x85" * 300_000, "a tuple"),
    "tuples that double": (b"N" + b"2\x86" * 500, "a tuple"),
    "modules that double": (doubling(60), "contain each other"),
    "module that contains itself": (
        module_of(b"}q\x00") + b"q\x010h\x00" + text("a") + b"h\x01s0h\x01",
        "too deep",
    ),
    "names of a megabyte, doubling": (
        doubling(20).replace(text("a"), text("a" * 1000)),
        "too deep",
    ),
    "key of nested tuples": (b"}" + b")" + b"\x85" * 100_000 + b"Ns", "a key"),
    "keys that collide": (
        b"}(" + b"".join(number(i * ((1 << 61) - 1)) + b"N" for i in range(50_000)) + b"u",
        "61 bits",
    ),
    "memo of 2^31": (b"Nr\xff\xff\xff\x7f", "NoneType"),
    "lines without end": (b"(" + b"Va\n" * 500_000 + b"t", "a tuple"),
    "marks": (b"(" * 300_000, "no single object"),
    "names in a state dict of a megabyte": (
        b"}" + text("a" * 1_000_000) + tensor(storage(4)) + b"s",
        "the key",
    ),
    "the same tensor under 100,000 names": (
        tensor(storage(4))
        + b"q\x000}("
        + b"".join(text(str(i)) + b"h\x00" for i in range(100_000))
        + b"u",
        "100000 tensors",
    ),
}


def bomb_files(folder: Path) -> dict[str, str]:
    for index, (body, _) in enumerate(BOMBS.values()):
        zipped(folder / f"{index}.pt", dump(body, 4), FOUR)
    return {f"{index}.pt": message for index, (_, message) in enumerate(BOMBS.values())}


def test_bombs(results: Results) -> None:
    for name, result in zip(BOMBS, results["bombs"], strict=True):
        assert result["expected"] in result["message"], (name, result)


def npy_files(tmp_path: Path) -> dict[str, str]:
    array = call("numpy.core.multiarray", "_reconstruct", ref("numpy", "ndarray"), b"(K\x00t", b"N")
    kind = call("numpy", "dtype", text("O"), b"\x89", b"\x88")
    nested = b"N" + b"".join(
        b"q" + bytes([i]) + b"0](" + (b"h" + bytes([i])) * 9 + b"e" for i in range(30)
    )
    for name, inner in {"doubling.npy": nested, "deep.npy": b"]" * 1000 + b"a" * 999}.items():
        npy(tmp_path / name, dump(array + b"(K\x01)" + kind + b"\x89](" + inner + b"etb"))
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }\n"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    (tmp_path / "huge.npy").write_bytes(head + bytes(64))
    (tmp_path / "code.npy").write_bytes(head.replace(b"'<f4'", b"__import__('os').system('x')"))
    (tmp_path / "short.npy").write_bytes(head[:7])
    return {path.name: "" for path in sorted(tmp_path.glob("*.npy"))}


def test_npy_bombs(results: Results) -> None:
    for result in results["npy"]:
        assert result["outcome"] == "refused", result


Results = dict[str, list[dict[str, Any]]]
BUILDERS = {
    "code": code_files,
    "broken": broken_files,
    "views": view_files,
    "zips": zip_files,
    "bombs": bomb_files,
    "npy": npy_files,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What became of every file, with what its message must hold, by group."""
    root = tmp_path_factory.mktemp("attacks")
    expected = {}
    for group, build in BUILDERS.items():
        (root / group).mkdir()
        for name, message in build(root / group).items():
            expected[f"{group}/{name}"] = message
    found: Results = {group: [] for group in BUILDERS}
    outcomes = run_target(root, "open", *expected)
    for (path, message), result in zip(expected.items(), outcomes, strict=True):
        group, name = path.split("/")
        assert result["file"] == name
        found[group].append({**result, "expected": message})
    assert not (root / "canary").exists()
    return found


# Random damage.


def seeds(folder: Path) -> list[str]:
    """Honest files of every format, as small as they come."""
    module = nn.Sequential(nn.Linear(2, 1), nn.LayerNorm(1))
    tensors = {"a": torch.ones(3, 2), "b": torch.zeros(2).bfloat16(), "c": torch.tensor(1)}
    torch.save(module, folder / "module_zip.pt")
    torch.save(tensors, folder / "tensors_zip.pt")
    torch.save(tensors, folder / "tensors_old.pt", _use_new_zipfile_serialization=False)
    torch.save(nn.Linear(1, 1, bias=False).state_dict(), folder / "state.bin")
    (folder / "module_plain.pkl").write_bytes(pickle.dumps(module))
    (folder / "tensors_plain.pkl").write_bytes(pickle.dumps(tensors, 4))
    np.save(folder / "anchors.npy", {"input": np.ones((2, 3), "f4"), "gt": np.arange(3)})
    np.save(folder / "plain.npy", np.ones((2, 3), "f4"))
    encoder = TARGET.parent / "data/image_encoder.pt.xz"
    (folder / "image_encoder.pt").write_bytes(lzma.decompress(encoder.read_bytes()))
    return [path.name for path in sorted(folder.iterdir()) if path.is_file()]


def test_mutated_files(tmp_path: Path) -> None:
    names = seeds(tmp_path)
    (result,) = run_target(tmp_path, "mutate", "6", "400", *names)
    assert result["wrong"] == []
    assert result["used"] + result["refused"] == 400 * len(names)
    assert result["refused"] > 2000
    assert result["used"] > 50
    assert result["slowest"] < SECONDS
    assert result["peak"] < PEAK

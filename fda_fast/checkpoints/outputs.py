"""The output directory: may it be written, does it fit, and what goes beside the weights."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from fda_fast.checkpoints.directory import inside
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.errors import InputError

# Copied from the base where it has them: whatever from_pretrained, tokenizers, processors and
# sentence-transformers look for, and what licences ask to keep.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
# What a directory under construction may hold.
_FIXED = (r"config\.json", r"README\.md", r"(fda|mergekit)_config\.yml")
_SHARD = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
_OURS = re.compile("|".join([_SHARD, *_FIXED, *(re.escape(n.split("/")[0]) for n in SIDE_FILES)]))
# Room for what is written beside the weights, and for file systems that are never quite full.
_MARGIN = 64 << 20


def check_output(output: Path) -> None:
    """Refuse an output that would overwrite something or cannot be made.

    Raises:
        InputError: a file, a directory with files in it, or a parent that is not writable.
    """
    if os.path.lexists(output):
        if not output.is_dir():
            raise InputError(f"output {output}", expected="a new or empty directory", got="a file")
        if os.listdir(output):
            raise InputError(
                f"output {output}",
                expected="a new or empty directory",
                got="a directory with files",
                fix="Nothing is ever overwritten: choose another directory, or empty this one",
            )
    parent = _existing(output.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"output {output}", expected=f"{parent} to be a writable directory")


def check_disk(output: Path, needed: int) -> None:
    """Refuse an output that does not fit, before anything is computed.

    Args:
        output: the directory to be written; it need not exist.
        needed: bytes to be written there.

    Raises:
        InputError: with the bytes needed and free.
    """
    free = shutil.disk_usage(_existing(output)).free
    if free < needed + _MARGIN:
        raise InputError(
            f"the disk of output {output} is too small",
            expected=f"{(needed + _MARGIN) / 1e9:.2f} GB free",
            got=f"{free / 1e9:.2f} GB",
            fix="Free some, choose another disk, or write a narrower dtype",
        )


def copy_side_files(base: Checkpoint, target: Path) -> list[str]:
    """Copy tokenizer and other files of the base that the merged model needs too.

    Returns:
        The names copied.

    Raises:
        InputError: one of them is a link out of the base's directory.
        OSError: as the operating system says.
    """
    if base.directory is None:
        return []
    copied = []
    for name in SIDE_FILES:
        if not (base.directory / name).is_file():
            continue
        source = inside(base.directory, name, base.role)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / name)
        copied.append(name)
    return copied


def clear_scratch(path: Path) -> None:
    """Remove what a run that died while writing left, and nothing else.

    Raises:
        InputError: something is there that no run of ours wrote.
    """
    if not os.path.lexists(path):
        return
    foreign = [str(path)]
    if path.is_dir() and not path.is_symlink():
        foreign = [name for name in os.listdir(path) if not _OURS.fullmatch(name)]
    if foreign:
        raise InputError(
            f"{path} is needed to build the output in",
            expected="nothing there, or the rest of an earlier run",
            got=foreign[0],
            fix="Move it away, or choose another output",
        )
    shutil.rmtree(path)


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _existing(path: Path) -> Path:
    """The nearest directory above ``path``, or itself, that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path

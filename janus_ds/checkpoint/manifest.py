"""A complete checkpoint: `complete.json`, the list of its files with sizes and checksums, and `state.json`.

DeepSpeed writes its shards straight to their final names and `latest` before they are known to be
complete, so a kill in a save leaves a torn checkpoint that looks like the newest. Here a folder counts
only if it holds a `complete.json` that agrees with every file beside it.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

from janus_ds.errors import CheckpointError
from janus_ds.io import atomic_file, read_json, sync_path, sync_tree

COMPLETE = "complete.json"
STATE_FILE = "state.json"
WEIGHTS_FILE = "weights.safetensors"
STEP_PREFIX = "step-"
"""Start of a checkpoint's folder name: step-NNNNNNNN."""
FORMAT_VERSION = 2
"""1: DeepSpeed's own shards in engine/. 2: whole tensors, see `tensors.py`."""
_CHUNK = 1 << 20
_OWN_SUM = "crc32"
"""Of the manifest itself, without this field; format 1 has none."""
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError)


def publish(working: Path, final: Path, before: Path) -> None:
    """Make a folder that has been written the checkpoint `final`, complete whatever moment a kill comes at.

    Args:
        working: the folder, beside `final`; gets its manifest here.
        before: where a folder that has this name now goes, until the new one is in its place.
    """
    sync_tree(working)
    write_manifest(working)
    if final.exists():
        final.rename(before)
    working.rename(final)
    sync_path(final.parent)
    shutil.rmtree(before, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Write `complete.json` for all files now in `folder`, as the last act of a save."""
    files = {
        str(path.relative_to(folder)): _record(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != COMPLETE
    }
    content = {"format_version": FORMAT_VERSION, "files": files}
    write_json(folder / COMPLETE, {**content, _OWN_SUM: _sum_of(content)})


def fault_of(folder: Path, only: str | None = None) -> str | None:
    """Why `folder` is not a complete checkpoint, in words; None if it is.

    Reads every byte: a checkpoint is about to be loaded anyway, and a flipped bit in an optimizer
    state would otherwise train on in silence.

    Args:
        folder: the checkpoint.
        only: the one file that is wanted; None: all that the manifest names.
    """
    try:
        manifest = _read_manifest(folder)
        if (folder / COMPLETE).read_text(encoding="utf-8") != _json_text(manifest):
            return f"{COMPLETE} has other white space than at its save"
        found = manifest["files"]
        names = [_inside(name) for name in found] if only is None else [only]
        expected = {name: {key: found[name][key] for key in ("size", "crc32")} for name in names}
    except FileNotFoundError:
        return f"{COMPLETE} is missing: the save was cut short"
    except _UNREADABLE as error:
        return f"{COMPLETE} cannot be read ({error})"
    for name, record in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != record["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {record['size']}"
        if _record(path) != record:
            return f"{name} has another checksum than at its save"
    return None


def weights_in(folder: Path) -> Path | None:
    """The weights file of a folder, or else of its newest checkpoint; None if there is none.

    Raises:
        CheckpointError: the file is not what training wrote; it names the newest one that is, if any.
    """
    for place in (folder, *reversed(step_folders(folder / "checkpoints"))):
        if not (place / WEIGHTS_FILE).is_file():
            continue
        fault = fault_of(place, only=WEIGHTS_FILE)
        # Weights that were converted or that the package ships have no manifest.
        if fault is None or not (place.name.startswith(STEP_PREFIX) or (place / COMPLETE).exists()):
            return place / WEIGHTS_FILE
        others = [path for path in reversed(step_folders(place.parent)) if path != place]
        whole = next((path for path in others if fault_of(path, only=WEIGHTS_FILE) is None), None)
        raise CheckpointError(
            f"the checkpoint is damaged: {fault}",
            str(place),
            f"name another checkpoint of the run, which is whole: {whole}"
            if whole
            else "restore it from a copy: no other checkpoint of the run is whole",
        )
    return None


def step_folders(root: Path) -> list[Path]:
    """The folders in `root` that have a checkpoint's name, oldest first; none if `root` does not exist.

    Raises:
        OSError: `root` cannot be read: that must not look as if there were none.
    """
    paths = root.iterdir() if root.is_dir() else ()  # `glob` would pass over an error
    found = [path for path in paths if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0)


def check_version(folder: Path) -> None:
    """Refuse a checkpoint that a newer program wrote; a damaged manifest is :func:`fault_of`'s business.

    Raises:
        CheckpointError: `complete.json` has a newer format version.
    """
    try:
        version = _read_manifest(folder)["format_version"]
    except _UNREADABLE:
        return
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format version {version}, "
            f"this program knows versions up to {FORMAT_VERSION}",
            str(folder / COMPLETE),
            "continue the run with the newer version of janus_ds that wrote it",
        )


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's folder name; None for other names."""
    digits = folder.name.removeprefix(STEP_PREFIX)
    is_step = folder.name.startswith(STEP_PREFIX) and digits.isascii() and digits.isdigit()
    return int(digits) if is_step and len(digits) < 20 else None


def read_state(folder: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint.

    Raises:
        CheckpointError: it is missing, or no JSON object.
    """
    try:
        return read_json(folder / STATE_FILE)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's state cannot be read ({error})",
            str(folder / STATE_FILE),
            "take another checkpoint of the run",
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old or the new one, and on disk on return."""
    with atomic_file(path) as file:
        file.write(_json_text(value).encode())


def _read_manifest(folder: Path) -> Any:
    """The contents of `complete.json`; a ValueError where its own checksum does not fit."""
    manifest = read_json(folder / COMPLETE)
    content = {key: value for key, value in manifest.items() if key != _OWN_SUM}
    # Format 1 has none; a damaged version must not pass for one.
    has_sum = _OWN_SUM in manifest or manifest["format_version"] == FORMAT_VERSION
    if has_sum and manifest[_OWN_SUM] != _sum_of(content):
        raise ValueError("it has another checksum than at its save")
    return manifest


def _inside(name: str) -> str:
    """A file's name in a manifest; a ValueError where it leads out of the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise ValueError(f"{name!r} is not in the folder")
    return name


def _sum_of(content: Any) -> int:
    return zlib.crc32(_json_text(content).encode())


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _record(path: Path) -> dict[str, int]:
    """Size in bytes and CRC-32 of one file."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return {"size": path.stat().st_size, "crc32": crc}

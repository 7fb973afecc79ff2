"""Where GLGE's files lie: its data folder, and the folder of a submission."""

from __future__ import annotations

from pathlib import Path

from janus_ds.errors import DataError, UsageError
from janus_ds.metrics.files import TextLines, read_lines
from janus_ds.metrics.glge import TASKS, Task
from janus_ds.metrics.glge_metrics import TaskTexts

__all__ = ["data_file", "find_prediction", "find_predictions", "read_texts"]


def data_file(data: Path, task: str, split: str, side: str) -> Path:
    """A file of the official layout: DATA/xsum_data/org_data/test.tgt.

    Args:
        data: the folder of one level, such as glge/easy.
        task: name of the task.
        split: "dev" or "test".
        side: "src" or "tgt".
    """
    return data / f"{task}_data" / "org_data" / f"{split}.{side}"


def read_texts(task: Task, predictions: Path, data: Path, split: str) -> TaskTexts:
    """Predictions with the references of the data folder, and the sources where the task uses them.

    Raises:
        DataError: a file is missing (sources may be) or not text.
    """
    references = data_file(data, task.name, split, "tgt")
    if not references.is_file():
        raise DataError(
            f"the references of {task.name} are missing",
            str(references),
            "--data is the folder of one level, such as glge/easy, that holds TASK_data/org_data/SPLIT.tgt",
        )
    sources: TextLines | None = None
    if task.uses_sources and (path := data_file(data, task.name, split, "src")).is_file():
        sources = read_lines(path)
    return TaskTexts(read_lines(predictions), read_lines(references), sources)


def find_predictions(folder: Path, split: str) -> dict[str, Path]:
    """The prediction file of each task that a submission has, in the order of the benchmark.

    Raises:
        DataError: the folder is missing, or there is none for any task.
        UsageError: there are several for one task.
    """
    if not folder.is_dir():
        raise DataError("there is no such folder", str(folder), "give a folder of predictions")
    found = {name: path for name in TASKS if (path := find_prediction(folder, name, split)) is not None}
    if not found:
        raise DataError(
            f"no predictions for any task and the split {split!r}",
            str(folder),
            f"name the files as submissions are named: xsum.easy.{split}, squadqg.easy.{split}, ...",
        )
    return found


def find_prediction(folder: Path, task: str, split: str) -> Path | None:
    """The prediction file of one task, or None: TASK.LEVEL.SPLIT, as submissions are named, TASK.SPLIT or
    TASK.SPLIT.txt.

    Raises:
        UsageError: there are several.
    """
    names = (f"{task}.{split}", f"{task}.{split}.txt")
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.name in names or (path.name.startswith(f"{task}.") and path.name.endswith(f".{split}")))
    ]
    if len(found) > 1:
        raise UsageError(
            f"there are {len(found)} predictions for {task}",
            ", ".join(str(path) for path in found),
            "keep one level's predictions in a folder",
        )
    return found[0] if found else None

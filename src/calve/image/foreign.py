"""What is uploaded, by its path: a directory that an image was built into, or a raw disk that was made elsewhere."""

from __future__ import annotations

from pathlib import Path

from calve.disk.describe import describe
from calve.errors import NotFoundError
from calve.image import ami
from calve.image.built import Built, is_built, load
from calve.progress import Progress, silent
from calve.tasks import Cancel

__all__ = ["take"]


def take(path: Path, *, progress: Progress = silent, cancel: Cancel | None = None) -> Built:
    """Read what is at a path; the disk of a directory that was built into is that directory's.

    Raises:
        NotFoundError: there is no image, and no file.
        UsageError, DamagedError: it is no raw disk that UEFI firmware starts, or its description is damaged.
    """
    if path.is_dir():
        return load(path)
    if not path.exists():
        raise NotFoundError("there is no image", place=path)
    if is_built(path.parent):
        built = load(path.parent)
        if built.raw.exists() and built.raw.samefile(path):  # it may be an overlay
            return built
    disk = describe(path, progress=progress, cancel=cancel)
    return Built(path.parent, disk, ami.plain_line(path.stem), file=path)

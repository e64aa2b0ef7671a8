"""Files that exist whole or not at all, locks, and what is a path; what differs on Windows is here alone."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vardistill.errors import UsageError, first_line

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

PARTIAL = ".partial-"
"""What names of files and folders that are being written begin with."""


@contextmanager
def whole(path: Path, folder: bool = False) -> Iterator[Path]:
    """A path beside `path`, with its suffix, to write a file to, or a `folder` that is there and empty.

    At the end it is flushed to the disk and takes the place of `path`; whatever goes wrong before, nothing of it is
    left, and `path` is as it was. What a killed process left is replaced by the next one's.

    Raises:
        UsageError: where it cannot be written, the disk being full for example.
    """
    place = Path(os.path.abspath(path))  # "." has no name; links stay as they are
    partial = place.with_name(f"{PARTIAL}{place.name}")
    try:
        if not folder and place.is_dir():  # told before the work of making it
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(place))
        remove(partial)
        if folder:
            partial.mkdir(parents=True)
        yield partial
        for part in (*partial.rglob("*"), partial):
            _flush(part)
        if folder:
            remove(place)
        partial.replace(place)
        _flush(place.parent)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot write {path}: {reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            remove(partial)


def write_whole(path: Path, text: str) -> None:
    """Replace a file's text, which is whole or not at all; raises UsageError where it cannot be written."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")  # JSON may hold surrogates, which UTF-8 lacks


def check_free(path: Path) -> None:
    """Raise UsageError where there is something that a new folder would replace."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} is there and not an empty folder: choose another")


def check_place(path: Path) -> None:
    """Raise UsageError where a file could not be written, before the work of making it."""
    parent = Path(os.path.abspath(path)).parent
    if not parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"cannot write {path}: its folder is not to be written")


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def located(source: str, built_in: tuple[str, ...] = ()) -> str:
    """A source, hf:SOURCE or a name, with an absolute path where it is a file or a folder here.

    What is kept of it is then found from everywhere, and is never taken for an id of the hub when it is gone.

    Args:
        source: a path, a name, an id of the hub, or one of the data sets on the hub with hf: before it.
        built_in: names that are no paths, whatever is here.
    """
    prefix = "hf:" if source.startswith("hf:") else ""
    name = source.removeprefix(prefix)
    return prefix + os.path.abspath(name) if name and name not in built_in and os.path.exists(name) else source


def is_path(word: str) -> bool:
    """Whether a word of the command line is meant as a path, not as a name."""
    return len(Path(word).parts) > 1 or bool(Path(word).suffix) or os.path.exists(word)


def typed(path: str | Path) -> str:
    """A path as a shell takes it, in quotes where it has a space."""
    return shlex.quote(str(path))


def check_hub_id(source: str | Path) -> None:
    """Raise UsageError where a source that is no folder here is no id of the Hugging Face hub either, but a path.

    An id is NAMESPACE/NAME, where here is no folder NAMESPACE.
    """
    if Path(source).is_file():
        raise UsageError(f"{source} is a file, but a folder is wanted")
    namespace = str(source).partition("/")[0]
    known = isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)
    if not known or Path(namespace).is_dir():
        raise UsageError(f"there is no folder {source}")


def reason(error: BaseException) -> str:
    """Why a file could not be written or read, without its path."""
    return (isinstance(error, OSError) and error.strerror) or first_line(error)


@contextmanager
def locked(path: Path, busy: str, patience: float = 0.0) -> Iterator[int]:
    """Hold the lock file `path`; yields its descriptor, which processes may inherit.

    The system lets go of it when the last process that holds it ends, however that is: a lock never outlives them. On a
    file system without locks nothing is held.

    Args:
        path: is made, and stays.
        busy: what to say where another process holds it.
        patience: seconds to wait for that one.

    Raises:
        UsageError: where another process holds it, or it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {reason(error)}") from error
    try:
        give_up = time.monotonic() + patience
        while not _lock(descriptor):
            if time.monotonic() >= give_up:
                raise UsageError(busy)
            time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether nobody else holds the lock, which then is this process's."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _flush(path: Path) -> None:
    """See to it that a file, or a folder's names, outlive a loss of power."""
    if path.is_dir():
        with contextlib.suppress(OSError):  # Windows opens no folders, and some file systems flush none
            _sync(path, os.O_RDONLY)
    else:
        _sync(path, os.O_RDWR)  # Windows flushes only what may be written


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files are whole or not there, on full disks and under the rules of Windows; locks end with their processes."""

from __future__ import annotations

import fcntl
import os
import resource
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vardistill import files
from vardistill.domains.pictures.figures import save_folder, save_grid
from vardistill.errors import UsageError
from vardistill.files import check_free, locked, whole, write_whole

PICTURES = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_and_a_folder_take_their_place_at_the_end(tmp_path: Path) -> None:
    for text in ("first", "second"):
        write_whole(tmp_path / "a.txt", text)
        with whole(tmp_path / "b", folder=True) as partial:
            (partial / text).touch()
            assert partial.parent == tmp_path
        assert (tmp_path / "a.txt").read_text() == text
        assert names(tmp_path) == ["a.txt", "b", f"b/{text}"]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "x"), "cannot write .*: No space left on device$"),
        (SafetensorError("I/O error: File too large (os error 27)"), "cannot write .*: I/O error: File too large"),
        (KeyboardInterrupt(), None),
    ],
)
def test_whatever_goes_wrong_what_was_there_stays_alone(
    error: BaseException, told: str | None, folder: bool, tmp_path: Path
) -> None:
    with whole(tmp_path / "a.npz", folder) as partial:
        (partial / "old" if folder else partial).touch()
    before = names(tmp_path)

    def write() -> None:
        with whole(tmp_path / "a.npz", folder) as partial:
            (partial / "new" if folder else partial).write_text("half")
            assert partial.suffix == ".npz"
            raise error

    with pytest.raises(UsageError if told else KeyboardInterrupt, match=told):
        write()
    assert names(tmp_path) == before


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".partial-a").mkdir()
    (tmp_path / ".partial-a" / "remnant").touch()
    write_whole(tmp_path / "a", "text")
    assert names(tmp_path) == ["a"]


def test_what_is_there_is_not_free(tmp_path: Path) -> None:
    check_free(tmp_path / "none")
    check_free(tmp_path)
    (tmp_path / "a").touch()
    for path in (tmp_path, tmp_path / "a"):
        with pytest.raises(UsageError, match="is there and not an empty folder: choose another"):
            check_free(path)


def as_arrays(path: Path) -> None:
    with whole(path) as partial:
        np.savez_compressed(partial, x=PICTURES.numpy())


def as_tensors(path: Path) -> None:
    with whole(path) as partial:
        save_file({"x": PICTURES}, partial)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.npz", as_arrays),
        ("x.safetensors", as_tensors),
        ("x.png", lambda path: save_grid(PICTURES, path)),
        ("x", lambda path: save_folder(PICTURES, path)),
    ],
)
def test_a_full_disk_is_told_in_a_line(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    """A limit on the size of files stands in for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(UsageError, match=f"cannot write .*{name}: .*File too large") as caught:
            write(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_the_rules_of_windows_suffice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, folders cannot be opened, descriptors that only read not be flushed, and names in use not be taken."""
    opened, flushed, replaced = os.open, os.fsync, Path.replace

    def open_like_windows(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *rest, **options)

    def fsync_like_windows(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        flushed(descriptor)

    def replace_like_windows(self: Path, target: Path) -> Path:
        if self.is_dir() and target.exists():
            raise PermissionError(13, "Access is denied", str(target))
        return replaced(self, target)

    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    monkeypatch.setattr(os, "open", open_like_windows)
    monkeypatch.setattr(os, "fsync", fsync_like_windows)
    monkeypatch.setattr(Path, "replace", replace_like_windows)
    test_a_file_and_a_folder_take_their_place_at_the_end(tmp_path)


def test_a_lock_of_windows_is_taken_and_refused(tmp_path: Path) -> None:
    """msvcrt's, of one byte, in the place of flock."""
    held: list[int] = []

    def locking(descriptor: int, mode: int, size: int) -> None:
        assert (mode, size) == (2, 1)
        if held:
            raise PermissionError(13, "Permission denied")
        held.append(descriptor)

    script = types.ModuleType("windows_files")
    windows = types.SimpleNamespace(**{**vars(sys), "platform": "win32"})
    source = Path(files.__file__).read_text().replace("import msvcrt", "pass").replace("import sys\n", "")
    vars(script).update(sys=windows, msvcrt=types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    exec(compile(source, files.__file__, "exec"), vars(script))
    with script.locked(tmp_path / ".lock", "busy"), pytest.raises(UsageError, match="busy"):
        script.locked(tmp_path / ".lock", "busy").__enter__()


def test_what_is_here_is_kept_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/digits", "digits"):
        Path(name).mkdir(parents=True)
    assert files.located("runs/digits") == f"{tmp_path}/runs/digits"
    assert files.located("hf:runs/digits") == f"hf:{tmp_path}/runs/digits"
    assert files.located("digits", ("digits",)) == "digits"
    for name in ("runs/none", "hf:a/b", "", "google/ddpm-cifar10-32"):
        assert files.located(name) == name


@pytest.mark.parametrize(
    "path", ["/nope", "nope", "a/b/c", "./a/b", "../b", "~/b", "runs/none", "C:\\a\\b", Path("a/b")]
)
def test_a_path_is_no_id_of_the_hub(path: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for known in ("google/ddpm-cifar10-32", "a/b.c_d"):
        files.check_hub_id(known)
    with pytest.raises(UsageError, match="^there is no folder "):
        files.check_hub_id(path)
    Path("file").touch()
    with pytest.raises(UsageError, match="^file is a file, but a folder is wanted$"):
        files.check_hub_id("file")


def test_a_place_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for fine in (Path("new.npz"), tmp_path / "new.npz"):
        files.check_place(fine)
        assert not fine.exists()
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").touch()
    for bad, why in (("no/x.npz", "there is no folder no"), ("file/x.npz", "no folder file"), ("folder.npz", "is a f")):
        with pytest.raises(UsageError, match=f"^cannot write {bad}: .*{why}"):
            files.check_place(Path(bad))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UsageError, match="its folder is not to be written"):
        files.check_place(Path("new.npz"))


def test_a_file_in_the_place_of_a_folder_is_refused_before_it_is_made(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="^cannot write .*there: Is a directory$"), whole(tmp_path / "there"):
        pytest.fail("the work was done")
    assert names(tmp_path) == ["there"]


def test_a_path_is_told_as_a_shell_takes_it() -> None:
    for path in ("runs/one", Path("runs/my first run"), "a;b$c'd"):
        assert shlex.split(f"vardistill sample {files.typed(path)} --num 3") == [
            "vardistill", "sample", str(path), "--num", "3",
        ]  # fmt: skip
    assert files.typed("runs/one") == "runs/one"


def test_a_lock_is_held_once_and_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path, "busy"), pytest.raises(UsageError, match="^busy$"), locked(path, "busy"):
        pass
    code = "import sys, time; from pathlib import Path; from vardistill.files import locked\n"
    code += "with locked(Path(sys.argv[1]), ''): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="^busy$"), locked(path, "busy"):
            pass
        process.kill()
    with locked(path, "busy"):
        pass


def test_a_lock_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write .*lock: "), locked(tmp_path / "none" / "lock", "busy"):
        pass

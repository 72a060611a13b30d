"""The data folder's lock, against real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chatserve.data_folder import LOCK_NAME, FolderLock
from chatserve.errors import SettingsError, StartError

HOLD = """
import pathlib, sys
from chatserve.data_folder import FolderLock
lock = FolderLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_told_who_is_the_first(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StartError, match=f"process {holder.pid}"):
            FolderLock(tmp_path)
        holder.kill()
        holder.wait()
        # However it ended, its lock has ended with it.
        with FolderLock(tmp_path):
            assert (tmp_path / LOCK_NAME).read_text() == f"{os.getpid()}\n"


def test_a_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; print('there', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        close_fds=False,  # as a careless library would
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"there\n"
        lock.close()
        FolderLock(tmp_path).close()
        child.communicate()


def test_closing_twice_closes_nothing_else(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / LOCK_NAME).stat().st_mode & 0o777 == 0o600
    lock.close()
    other = FolderLock(tmp_path)  # takes the descriptor that was freed
    lock.close()
    with pytest.raises(StartError):
        FolderLock(tmp_path)
    other.close()


def test_a_folder_that_cannot_be_used_is_a_bad_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError):
        FolderLock(tmp_path / "file")
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "file")
    with pytest.raises(SettingsError):
        FolderLock(tmp_path)

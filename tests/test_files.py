"""Files are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.errors import ConfigError
from zoo.files import check_folder, check_writable, fresh_folder, put_in_place, whole_file

ROOT = Path(__file__).resolve().parent.parent


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text("old")
    with whole_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["facts.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text("old")

    def interrupted() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["facts.json"]


def test_a_file_has_the_permissions_that_the_user_gives_files(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "card.md") as file:
            file.write(b"text")
    finally:
        os.umask(before)
    assert (tmp_path / "card.md").stat().st_mode & 0o777 == 0o640


def test_a_disk_without_room_loses_nothing(tmp_path):
    """The limit on file size stands for a full disk: writing fails half way."""
    (tmp_path / "weights.bin").write_bytes(b"old")
    code = """
import resource, signal
from zoo.files import whole_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
with whole_file("weights.bin") as file:
    file.write(bytes(1 << 20))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "File too large" in run.stderr
    assert os.listdir(tmp_path) == ["weights.bin"]
    assert (tmp_path / "weights.bin").read_bytes() == b"old"


@pytest.mark.parametrize(("name", "message"), [("", "it is a folder"), ("nowhere/x.txt", "there is no folder")])
def test_a_place_that_cannot_be_written_is_named_before_the_work(name, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        check_writable(tmp_path / name)
    with pytest.raises(ConfigError, match=message), whole_file(tmp_path / name):
        pytest.fail("the block must not run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_someone_else(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="not yours to write to"):
        check_writable(tmp_path / "x.txt")


def test_a_good_place_is_given_back_as_a_path(tmp_path):
    assert check_writable(str(tmp_path / "x.txt")) == tmp_path / "x.txt"
    assert os.listdir(tmp_path) == []


# -------------------------------------------------------------------------------------------------------------- folders


def fill(folder: Path, text: str, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def write(folder: Path, overwrite: bool = True) -> None:
    check_folder(folder, overwrite)
    put_in_place(fill(fresh_folder(folder), "new", "config.json", "weights"), folder)


NEW = {"config.json": "new", "weights": "new"}


def test_a_folder_keeps_what_has_other_names(tmp_path):
    write(fill(tmp_path / "out", "old", "weights", "notes"))
    assert contents(tmp_path / "out") == {**NEW, "notes": "old"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("names", [None, (), ("weights", "notes")], ids=["none there", "empty", "filled"])
def test_a_link_to_a_folder_stays_one(names, tmp_path):
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "models"
    if names is not None:
        fill(target, "old", *names)
    link = tmp_path / "link"
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert contents(target) == {**NEW, **({"notes": "old"} if names else {})}
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]
    assert os.listdir(tmp_path / "disk") == ["models"]


@pytest.mark.parametrize("inside", [".", "below"])
def test_the_current_folder_stays_itself(inside, tmp_path, monkeypatch):
    here = fill(tmp_path / "here", "old", "weights", "notes")
    (here / "config.json").mkdir()
    (here / "below").mkdir()
    monkeypatch.chdir(here / inside)
    write(here)
    assert os.path.samefile(Path.cwd(), here / inside)
    (here / "below").rmdir()
    assert contents(here) == {**NEW, "notes": "old"}
    assert os.listdir(tmp_path) == ["here"]


def test_what_was_made_beside_a_folder_that_stays_is_moved_into_it(tmp_path, monkeypatch):
    here = fill(tmp_path / "here", "old", "weights")
    monkeypatch.chdir(here)
    put_in_place(fill(tmp_path / ".fresh", "new", "config.json", "weights"), Path("../here").absolute())
    assert contents(here) == NEW
    assert os.listdir(tmp_path) == ["here"]


@pytest.mark.skipif(shutil.which("unshare") is None, reason="mounts are Linux's")
@pytest.mark.parametrize("mount", ["mount -t tmpfs t disk", "mount --bind same disk"])
def test_a_mount_point_is_written_to(tmp_path, mount):
    for name in ("disk", "same"):
        (tmp_path / name).mkdir()
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    code = """
from pathlib import Path
from tests.test_files import NEW, contents, fill, write
disk = Path("disk").absolute()
write(disk, overwrite=False)
assert contents(disk) == NEW
write(fill(disk, "old", "weights", "notes"))
assert contents(disk) == {**NEW, "notes": "old"}
"""
    command = f'{mount} && exec "$0" -c "$1"'
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, sys.executable, code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert sorted(os.listdir(tmp_path)) == ["disk", "same"]

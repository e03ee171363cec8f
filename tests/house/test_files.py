"""Files are whole or absent."""

import errno
import os

import pytest

from inferix_kernels.files import atomic_write, require_writable


def test_a_file_appears_whole_with_the_permissions_of_any_other(tmp_path):
    path, plain = tmp_path / "x.json", tmp_path / "plain"
    plain.write_text("")
    with atomic_write(path) as part:
        assert not path.exists()
        part.unlink()  # as libraries do that write a temporary file of their own
        part.write_text("new")
        part.chmod(0o600)
    assert path.read_text() == "new" and path.stat().st_mode == plain.stat().st_mode
    assert sorted(tmp_path.iterdir()) == [plain, path]


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"--out: no space left: '.*x.json'"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), r"--out: no space left: '.*x.json'"),
        (RuntimeError("I/O error: File too large (os error 27)"), r"--out: cannot write '.*x.json': File too large$"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), r"--out: cannot write '.*x.json': Input/output error"),
    ],
)
def test_after_an_error_the_earlier_file_is_as_it_was(tmp_path, error, said):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(ValueError, match=said), atomic_write(path, "--out") as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_without_a_name_is_one_line(path):
    with pytest.raises(ValueError, match=r"^path: cannot write '.*': Is a directory$"), atomic_write(path):
        pass


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with (
        pytest.raises(ValueError, match=r"--out: cannot write '.*/no/x': No such file or directory"),
        atomic_write(tmp_path / "no" / "x", "--out"),
    ):
        raise AssertionError("nothing could have been written")


def test_writers_of_one_path_do_not_meet(tmp_path):
    path = tmp_path / "x"
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the last to finish


def test_a_link_is_followed_wherever_it_leads(tmp_path):
    """It stays a link; what is there is replaced, what is not is made, and nothing else appears."""
    (tmp_path / "far").mkdir()
    for path, target in ((tmp_path / "new", "far/x"), (tmp_path / "again", "new")):
        path.symlink_to(target)
        with atomic_write(path) as part:
            assert part.parent == tmp_path / "far"  # of the same file system, to be renamed
            part.write_text(path.name)
        assert path.is_symlink() and (tmp_path / "far" / "x").read_text() == path.name
        assert require_writable(path, "--out") == tmp_path / "far" / "x"
    assert sorted(os.listdir(tmp_path)) == ["again", "far", "new"] and os.listdir(tmp_path / "far") == ["x"]


@pytest.mark.parametrize(
    "to, reason", [("no/x", "No such file or directory"), ("x", "Too many levels of symbolic links")]
)
def test_a_link_that_leads_nowhere_is_one_line(tmp_path, to, reason):
    (tmp_path / "x").symlink_to(to)
    said = rf"^--out: cannot write '.*/x': {reason}$"
    with pytest.raises(ValueError, match=said), atomic_write(tmp_path / "x", "--out"):
        raise AssertionError("nothing could have been written")
    with pytest.raises(ValueError, match=said):
        require_writable(tmp_path / "x", "--out")
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").is_symlink()

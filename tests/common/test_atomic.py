import pytest

from hnml_hf.common.atomic import atomic_write, check_new_folder, new_folder


def test_half_a_file_takes_no_ones_place(tmp_path):
    path = tmp_path / "new" / "report.html"
    with atomic_write(path) as unfinished:
        unfinished.write_text("old")
        assert not path.exists() and unfinished.suffix == path.suffix
    with pytest.raises(OSError, match="full"), atomic_write(path) as unfinished:
        unfinished.write_text("ne")
        raise OSError("full")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "summary.json"
    with atomic_write(path) as one, atomic_write(path) as other:
        one.write_text("1")
        other.write_text("2")
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]  # the inner one was done first


def test_a_folder_is_complete_or_not_there(tmp_path):
    path = tmp_path / "below" / "new"
    with new_folder(path) as unfinished:
        (unfinished / "a").write_text("a")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["a"] and list(path.parent.iterdir()) == [path]
    with pytest.raises(FileExistsError, match="is there already"), new_folder(path):
        pytest.fail("this is never reached")
    path.joinpath("a").unlink()
    with pytest.raises(OSError, match="full"), new_folder(path) as unfinished:  # an empty folder may be taken
        (unfinished / "b").write_text("b")
        raise OSError("full")
    assert list(path.parent.iterdir()) == [path] and not list(path.iterdir())


def test_one_process_at_a_time_writes_a_folder(tmp_path):
    path = tmp_path / "new"
    with new_folder(path) as unfinished:
        (unfinished / "a").write_text("first")
        with pytest.raises(FileExistsError, match="Another process is writing .*new: wait"), new_folder(path):
            pytest.fail("this is never reached")
    assert (path / "a").read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_of_a_folder_is_deleted(tmp_path):
    (tmp_path / "new.part" / "old").mkdir(parents=True)
    (tmp_path / "new.part" / "link").symlink_to(tmp_path)
    with new_folder(tmp_path / "new") as unfinished:
        (unfinished / "a").write_text("a")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "other.part").symlink_to(tmp_path / "elsewhere")
    with new_folder(tmp_path / "other") as unfinished:
        (unfinished / "a").write_text("a")
    assert not list((tmp_path / "elsewhere").iterdir()) and (tmp_path / "other" / "a").is_file()


def test_a_folder_that_cannot_be_made_is_known_beforehand(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileExistsError, match="full is there already"):
        check_new_folder(tmp_path / "full")
    with pytest.raises(NotADirectoryError) as found:
        check_new_folder(tmp_path / "file" / "new")
    assert found.value.filename == str(tmp_path / "file" / "new")
    check_new_folder(tmp_path / "empty")
    check_new_folder(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path / "empty")
    for path in (".", tmp_path / "empty"):
        with pytest.raises(FileExistsError, match="is in use, as a mount or the current folder"):
            check_new_folder(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with new_folder(tmp_path / "link") as unfinished:
        (unfinished / "a").write_text("a")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "a").is_file()


def test_an_error_leaves_no_folders_above(tmp_path):
    with pytest.raises(OSError, match="full"), new_folder(tmp_path / "a" / "b" / "new"):
        raise OSError("full")
    assert not list(tmp_path.iterdir())

import pytest

from hnml_hf.atomic import whole_file


def test_half_a_file_takes_no_ones_place(tmp_path):
    path = tmp_path / "new" / "report.html"
    with whole_file(path) as unfinished:
        unfinished.write_text("old")
        assert not path.exists() and unfinished.suffix == path.suffix
    with pytest.raises(OSError, match="full"), whole_file(path) as unfinished:
        unfinished.write_text("ne")
        raise OSError("full")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "summary.json"
    with whole_file(path) as one, whole_file(path) as other:
        one.write_text("1")
        other.write_text("2")
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]  # the inner one was done first

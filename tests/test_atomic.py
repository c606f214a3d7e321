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
    unfinished.write_text("left by a process that was killed")
    with whole_file(path) as unfinished:
        unfinished.write_text("new")
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]

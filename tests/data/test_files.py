import tarfile
import zipfile

import pytest

from hnml_hf import load_noisy_dataset
from hnml_hf.data import files
from hnml_hf.data.files import missing_files, parse_integer, parse_path, read_lines, refuse_archive


def test_lines_end_at_line_feeds_only(tmp_path):
    """U+2028, U+0085 and the form feed may be part of a name; `str.splitlines` would cut there."""
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa\u2028b\r\nc\x85d\ne\x0cf \n\n \r\n".encode())
    assert list(read_lines(path)) == [(1, "a\u2028b"), (2, "c\x85d"), (3, "e\x0cf ")]


@pytest.mark.parametrize("text", ["a,b.jpg", "a b.jpg", "ä/ö.jpg", "..a/b..jpg", "a/...jpg", "日本/1.png"])
def test_paths_inside(text):
    assert parse_path(text, "list", 1) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/a",
        "\\a",
        "../a",
        "a/../b",
        "a\\..\\b",
        "a/..",
        "C:/a",
        "c:a",
        "a/",
        ".",
        "a/.",
        "a\x00b",
        "a\tb",
        "\ud800",
    ],
)
def test_paths_outside(text):
    with pytest.raises(ValueError, match="list:7: "):
        parse_path(text, "list", 7)


@pytest.mark.parametrize("text", ["", "+1", "1_0", "1.0", " 1", "0x1", "٣", "9" * 5000, "--1"])
def test_integers_are_plain_digits(text):
    with pytest.raises(ValueError, match="list:7: label must be an integer"):
        parse_integer(text, "list", 7, "label", 0, 10)


def test_missing_files_lists_each_folder_once(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").touch()
    (tmp_path / "a/folder.jpg").mkdir()
    (tmp_path / "2.jpg").touch()
    asked = []
    listing = files.file_names
    monkeypatch.setattr(files, "file_names", lambda folder: asked.append(folder) or listing(folder))
    names = ["a/1.jpg", "2.jpg", "a/folder.jpg", "a/3.jpg", "b/1.jpg", "a/1.jpg"]
    assert missing_files(str(tmp_path), names).tolist() == [False, False, True, True, True, False]
    assert len(asked) == 3


@pytest.mark.parametrize("member", ["../x.jpg", "a/../../x.jpg", "/x.jpg", "..\\x.jpg"])
def test_archives_that_climb_out_are_refused(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr(member, b"x")
    with tarfile.open(tmp_path / "data.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo(member))
    for name in ("data.zip", "data.tar.gz"):
        with pytest.raises(ValueError, match="members that lead outside"):
            refuse_archive(tmp_path / name)


def test_other_archives_are_to_be_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("a..b/x.jpg", b"x")
    with pytest.raises(ValueError, match="unpack it and pass the folder"):
        load_noisy_dataset(str(tmp_path / "data.zip"))
    with pytest.raises(ValueError, match="unpack it and pass the folder"):
        load_noisy_dataset("imagefolder", data_dir=tmp_path / "data.zip")
    (tmp_path / "table.csv").write_text("image,label\n")
    refuse_archive(tmp_path / "table.csv")
    refuse_archive(tmp_path)
    refuse_archive("imagefolder")

import pytest

from penalties_jax.recipes import files


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_file_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    files.write_file(path, "old")

    def fail(*_):
        raise OSError("no space left")

    owner = files.os if step == "fsync" else files.Path
    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(OSError, match="no space left"):
        files.write_file(path, b"new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


def test_what_lies_where_a_file_is_first_written_is_not_written_through(tmp_path):
    (tmp_path / ".penalties-jax.new").symlink_to(tmp_path / "file")
    files.write_file(tmp_path / "file", "whole")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "whole")]


def test_lines_are_one_line(capsys):
    files.tell("two\nlines  and spaces")
    assert capsys.readouterr().err == "penalties-jax: two lines and spaces\n"

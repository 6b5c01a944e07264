"""Atomic writes: a file is replaced as a whole or not at all."""

import pytest

from llmgr_rec.files import atomic_write


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    file = tmp_path / "new" / "table.csv"
    for text in ("first", "second"):
        with atomic_write(file) as partial:
            partial.write_text(text)
            assert not file.exists() or file.read_text() == "first"
        assert file.read_text() == text
    assert list(file.parent.iterdir()) == [file]


def test_a_file_stays_where_writing_fails(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("before")

    def fail() -> None:
        with atomic_write(file) as partial:
            partial.write_text("ha")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]

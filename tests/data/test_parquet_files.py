"""Which files of an input folder are read, and what is said of the others."""

import os
from pathlib import Path

import pytest

from llmgr_rec.data.parquet_files import list_parquet_files
from llmgr_rec.errors import UserError


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_files_at_any_depth_by_any_suffix_and_through_links_are_read_once(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "b.PARQUET", "a/x.parq", "a/y.pq", "c.parquet", "notes.txt", "_SUCCESS", ".c.crc")
    outside = make(tmp_path / "outside", "z.parquet")
    make(folder, "out/_manifest.json", "out/part-0.parquet")
    (folder / "far").symlink_to(outside)
    (folder / "a0").symlink_to(folder / "a")
    (folder / "a/up").symlink_to(folder)
    (folder / "d.parquet").symlink_to(folder / "c.parquet")
    os.mkfifo(folder / "pipe.parquet")
    listing = list_parquet_files(folder, "input", output_marker="_manifest.json")
    assert [file.name for file in listing.files] == ["a/x.parq", "a/y.pq", "b.PARQUET", "c.parquet", "far/z.parquet"]
    assert all(file.path == folder / file.name for file in listing.files)
    reasons = dict(listing.skipped)
    assert reasons.pop("a0") == "same as a"
    assert reasons.pop("d.parquet") == "same as c.parquet"
    assert reasons.pop("a/up") == "same as the folder itself"
    assert reasons.pop("pipe.parquet") == "not a regular file"
    assert reasons.pop("out") == "an output of this program"
    assert reasons.pop("notes.txt") == "not named *.parquet"
    assert set(reasons) == {"_SUCCESS", ".c.crc"}
    make(folder, *(f"a/old{n}\n.csv" for n in range(5)))
    text = list_parquet_files(folder, "input", output_marker="_manifest.json").describe()
    assert text.startswith("5 files read (a/x.parq, a/y.pq, b.PARQUET, c.parquet, far/z.parquet), 11 skipped (")
    assert "'a/old0\\n.csv: not named *.parquet'" in text
    assert text.endswith("and 1 more), 2 hidden skipped (name starts with . or _)")


def test_a_link_without_another_name_is_followed_and_a_single_file_may_have_any_name(tmp_path: Path) -> None:
    make(tmp_path, "out/data", "in/x.txt", "many/0/x.parquet")
    # Every folder is linked from all others.
    for folder in range(12):
        (tmp_path / f"many/{folder}").mkdir(exist_ok=True)
        for other in range(12):
            (tmp_path / f"many/{folder}/to{other}").symlink_to(tmp_path / f"many/{other}")
    assert [file.name for file in list_parquet_files(tmp_path / "many", "input").files] == ["0/x.parquet"]
    (tmp_path / "in/x.parquet").symlink_to(tmp_path / "out/data")
    (tmp_path / "in/y.parquet").symlink_to(tmp_path / "in/x.txt")
    names = [file.name for file in list_parquet_files(tmp_path / "in", "input").files]
    assert names == ["x.parquet", "y.parquet"]
    single = list_parquet_files(tmp_path / "out/data", "input")
    assert (single.files[0].name, single.skipped) == ("data", ())
    assert single.describe() == "1 file read (data)"


def test_partition_columns_come_from_folders_below_the_input(tmp_path: Path) -> None:
    folder = make(
        tmp_path / "dt=ignored",
        "dt=2026-11-01/shop=a%2Fb/x.parquet",
        "dt=__HIVE_DEFAULT_PARTITION__/=odd/x.parquet",
        "dt=/k=a=b.parquet",
        "x.parquet",
    )
    partitions = {file.name: file.partitions for file in list_parquet_files(folder, "input").files}
    assert partitions == {
        "dt=/k=a=b.parquet": {"dt": ""},
        "dt=2026-11-01/shop=a%2Fb/x.parquet": {"dt": "2026-11-01", "shop": "a/b"},
        "dt=__HIVE_DEFAULT_PARTITION__/=odd/x.parquet": {"dt": None},
        "x.parquet": {},
    }
    make(folder, "dt=1/dt=2/x.parquet")
    with pytest.raises(UserError, match="dt=1/dt=2: two folders name column dt"):
        list_parquet_files(folder, "input")


def test_broken_links_and_folders_without_parquet_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent does not exist; give a Parquet file or a folder of them to --input"):
        list_parquet_files(tmp_path / "absent", "input")
    make(tmp_path, "in/clicks.csv")
    with pytest.raises(UserError, match=r"in has no \*\.parquet file \(skipped clicks.csv: not named \*\.parquet\)"):
        list_parquet_files(tmp_path / "in", "input")
    (tmp_path / "in/day").symlink_to("gone")
    with pytest.raises(UserError, match="day is a link to gone, which does not exist"):
        list_parquet_files(tmp_path / "in", "input")


def test_tables_with_deleted_rows_and_names_that_are_not_text_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "in/table/part-0.parquet", "in/table/_delta_log/0.json", "other/x.parquet")
    with pytest.raises(UserError, match="table is a Delta Lake table, whose files also hold rows that were deleted"):
        list_parquet_files(tmp_path / "in", "input")
    (tmp_path / "other" / os.fsdecode(b"\xff.parquet")).touch()
    with pytest.raises(UserError, match=r"a name in .*other is not UTF-8: '\\udcff.parquet'; rename it"):
        list_parquet_files(tmp_path / "other", "input")

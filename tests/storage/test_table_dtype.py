"""Bundles whose embedding tables are loaded, or written, in fewer bits."""

from unittest import mock

import pytest
import torch

from llmgr_rec import Recommender, UserError
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.export import main as export
from llmgr_rec.modules.quantized_tables import decode_rows, encode_rows, row_bytes
from llmgr_rec.storage import bundle as bundles
from llmgr_rec.storage.bundle import TableReader, load_bundle, open_bundle
from llmgr_rec.storage.bundle_index import read_index
from tests.sharded_bundles import sharded_bundles
from tests.small_run import NUM_ITEMS, ONE_RANK, small_run

# Largest difference of a score from that of float32; scores are cosines divided by 0.07, up to 14.
TOLERANCE = {"float16": 0.02, "int8": 0.2, "int4": 4.0}
SESSIONS = [["i1", "i2", "i3"], ["i7"], ["i30", "i31", "i30", "i5"]]


def plain_rows(values_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """What a row becomes by codes of the given number of bits between its smallest and its largest value."""
    low_R1 = values_RC.amin(dim=1, keepdim=True).half().float()
    steps = 2**bits - 1
    scale_R1 = ((values_RC.amax(dim=1, keepdim=True) - low_R1) / steps).half().float()
    return ((values_RC - low_R1) / scale_R1).round().clamp(0, steps) * scale_R1 + low_R1


@pytest.mark.parametrize(("dtype", "bits"), [("int8", 8), ("int4", 4)])
def test_codes_are_those_of_a_row_by_row_reference(dtype, bits):
    values_RC = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    values_RC[3] = 0.25
    encoded = encode_rows(values_RC, dtype)
    assert (encoded.dtype, encoded.shape) == (torch.uint8, (50, row_bytes(12, dtype)))
    decoded = decode_rows(encoded, dtype)
    step_R1 = (values_RC.amax(dim=1, keepdim=True) - values_RC.amin(dim=1, keepdim=True)) / (2**bits - 1)
    others = torch.arange(50) != 3
    torch.testing.assert_close(decoded[others], plain_rows(values_RC, bits)[others], rtol=0, atol=0.02)
    assert ((decoded - values_RC).abs() <= 0.52 * step_R1 + 2e-3).all()
    assert torch.equal(decoded[3], values_RC[3])


def test_values_beyond_float16_are_refused():
    for dtype in ("float16", "int8"):
        with pytest.raises(OverflowError, match="65,504"):
            encode_rows(torch.full((1, 4), 1e5), dtype)
    assert torch.equal(encode_rows(torch.full((1, 4), 1e5), "float32"), torch.full((1, 4), 1e5))


def by_item(recommender: Recommender) -> torch.Tensor:
    """Scores of all items for the sessions, in the order of the items' ids."""
    rows = recommender.recommend(SESSIONS, NUM_ITEMS, exclude_seen=False).to_pylist()
    return torch.tensor(
        [[score for _, score in sorted(zip(row["item_ids"], row["scores"], strict=True))] for row in rows]
    )


@pytest.mark.parametrize("stage", ["sbr", "behave"])
def test_scores_of_tables_in_fewer_bits_are_close_and_an_export_has_the_same(stage, tmp_path):
    """The export has the codes that loading makes, of which none is made anew when it is loaded."""
    source = small_run().run / "export" / stage
    exact = by_item(Recommender.load(source))
    largest = float("inf")
    for dtype, tolerance in TOLERANCE.items():
        loaded = Recommender.load(source, table_dtype=dtype)
        found = by_item(loaded)
        torch.testing.assert_close(found, exact, rtol=0, atol=tolerance)
        assert not torch.equal(found, exact)
        export(["--run", str(source), "--output", str(tmp_path / dtype), "--table_dtype", dtype])
        index = read_index(tmp_path / dtype / "export" / stage)
        assert index.table_dtype == dtype
        assert torch.equal(by_item(Recommender.load(tmp_path / dtype)), found)
        # Other commands of the package read the rows as float32.
        again = by_item(Recommender.load(tmp_path / dtype, table_dtype="float32"))
        torch.testing.assert_close(again, found, rtol=0, atol=1e-3 if dtype == "float16" else 2e-2)
        size = sum(path.stat().st_size for path in (tmp_path / dtype / "export" / stage / "tables").iterdir())
        assert size < largest
        largest = size
    # Whoever has fewer bits only cannot get back what was lost.
    export(["--run", str(tmp_path / "int8"), "--output", str(tmp_path / "back"), "--table_dtype", "float32"])
    back = by_item(Recommender.load(tmp_path / "back"))
    torch.testing.assert_close(back, by_item(Recommender.load(tmp_path / "int8")), rtol=0, atol=2e-2)


def test_an_export_of_all_stages_shares_their_files(tmp_path, capsys):
    export(["--run", str(small_run().run), "--output", str(tmp_path / "half"), "--table_dtype", "float16"])
    stages = [tmp_path / "half" / "export" / stage / "tables" for stage in ("sbr", "behave")]
    first, second = ({path.name: path.stat().st_ino for path in folder.iterdir()} for folder in stages)
    assert first.items() <= second.items()
    assert "embedding tables of float16" in capsys.readouterr().out
    export(
        ["--run", str(small_run().run), "--output", str(tmp_path / "one"), "--table_dtype", "int8", "--stage", "sbr"]
    )
    assert [path.name for path in (tmp_path / "one" / "export").iterdir()] == ["sbr"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "model.pt2", "--table_dtype", "int8"], "a program has no tables"),
        (["--output", "folder", "--table_dtype", "int8", "--k", "5"], "--k is for programs"),
        (["--output", "folder", "--table_dtype", "int3"], r"'float16', 'int8', 'int4'.*Got value: int3"),
        (["--output", "folder", "--table_dtype", "int8", "--stage", "align"], "no complete export of stage align"),
    ],
)
def test_one_line_for_options_that_do_not_fit(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, SystemExit), match=message):
        export(["--run", str(small_run().run), *options])
    assert not list(tmp_path.iterdir())


def test_one_line_where_the_tables_do_not_fit_or_their_values_do_not(tmp_path):
    source = small_run().run / "export" / "sbr"
    with sharded_bundles(), pytest.raises(UserError, match=r"tables of int4 cannot be shared by ranks.*float16"):
        load_bundle(source, ONE_RANK, table_dtype="int4")
    with pytest.raises(UserError, match="table_dtype is 'int2'; give one of float32, float16, int8, int4"):
        Recommender.load(source, table_dtype="int2")
    with (
        mock.patch.object(bundles.TableReader, "read", return_value=torch.full((60, 16), 1e5)),
        pytest.raises(UserError, match=r"item_id-r0-c0.safetensors has values beyond 65,504.*give float32"),
    ):
        Recommender.load(source, table_dtype="int8")


def test_fewer_bits_fit_where_float32_does_not():
    files = open_bundle(small_run().run / "export" / "sbr")
    size = sum(rows * row_bytes(columns, "int8") for rows, columns in files.index.tables.values())
    files.config.tables.memory_per_rank_gb = size / 2**30
    found = {dtype: bundles.fits_each_rank(files, dtype) for dtype in ("float32", "float16", "int8", "int4")}
    assert found == {"float32": False, "float16": False, "int8": True, "int4": True}


def test_some_rows_of_a_quantized_table_are_those_of_the_block(tmp_path):
    export(["--run", str(small_run().run / "export" / "sbr"), "--output", str(tmp_path / "a"), "--table_dtype", "int4"])
    files = open_bundle(tmp_path / "a")
    reader = TableReader(files.path, files.index.table_files["item_id"], files.index.table_dtype)
    rows = torch.tensor([5, 0, 59])
    assert torch.equal(reader.take(rows, range(4, 12)), reader.read(range(60), range(16))[rows, 4:12])


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_tables_are_freed_where_nothing_needs_them_any_more(dtype):
    loaded = load_bundle(small_run().run / "export" / "sbr", table_dtype=dtype)
    clicks = Jagged.from_lengths(torch.tensor([3, 1, 3, 7]), torch.tensor([3, 1]))
    ranking = loaded.ranking(keeps_tables=False)
    expected_BQ = ranking.queries(ranking.collate(RawSessions.to_rank(clicks)))
    id_table, expected_VQ = loaded.model.item_tables.id_table(), loaded.ranking().ranker(ONE_RANK).item_vectors
    ranker = ranking.ranker(ONE_RANK)
    torch.testing.assert_close(ranker.item_vectors, expected_VQ, rtol=0, atol=0)
    # The vectors take the place of the table.
    assert (id_table is None) == (dtype != "float32")
    assert id_table is None or ranker.item_vectors.data_ptr() == id_table.data_ptr()
    fast = ranking.with_query_encoder(ranker)
    assert not loaded.model.item_tables.state_dict()
    torch.testing.assert_close(fast.queries(fast.collate(RawSessions.to_rank(clicks))), expected_BQ)

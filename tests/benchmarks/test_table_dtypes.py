import json

from benchmarks.table_dtypes import main
from tests.small_run import small_run


def test_every_format_has_its_size_and_quality(tmp_path, capsys):
    small, report = small_run(), tmp_path / "report.json"
    run, dataset = str(small.run / "export" / "sbr"), str(small.dataset.path)
    main(["--run", run, "--dataset", dataset, "--rounds", "1", "--threads", "1", "--output", str(report)])
    results = json.loads(report.read_text())["results"]
    assert list(results) == ["float32", "float16", "int8", "int4"]
    sizes = [row["tables_mib"] for row in results.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert all(row["bundle_mib"] > row["tables_mib"] and 0 <= row["ndcg@20"] <= 1 for row in results.values())
    assert len(capsys.readouterr().out.splitlines()) == 6

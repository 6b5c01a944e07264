import json
import sys

import pytest

from benchmarks import growth
from benchmarks.growth import exponents, plot, sizes, slope, table
from benchmarks.growth_stages import STAGES, Size
from llmgr_rec.cli import run_cli


def cost(processor_s, process_mib=500.0):
    return {
        "seconds": processor_s + 6,
        "processor_s": processor_s,
        "step_ms": 20.0,
        "tree_mib": process_mib + 20,
        "process_mib": process_mib,
    }


def results():
    def cells(ats, work):
        return [{"at": at, "stages": {stage: cost(work(at)) for stage in STAGES}} for at in ats]

    axes = {
        "sessions": cells((1000, 3000, 10000), lambda at: 5 + at / 100),
        "items": cells((100, 1000, 10000), lambda at: 5 + at**0.5),
        "ranks": cells((1, 2, 4), lambda at: 5.0),
    }
    reader = [{"at": at, "added_mib": 12.5} for at in (40000, 120000)]
    return {"axes": axes, "exponents": exponents(axes), "reader": reader}


def test_slope_of_a_power_is_its_exponent():
    assert slope([1.0, 10.0, 100.0], [3.0, 3 * 10**1.5, 3 * 10**3.0]) == pytest.approx(1.5)
    assert slope([1.0, 2.0], [5.0, 5.0]) == pytest.approx(0.0)
    assert slope([1.0, 2.0], [5.0, 0.0]) is None


def test_start_up_has_no_part_in_the_growth_above_the_base():
    found = results()["exponents"]["sessions"]["sbr"]
    assert found["above_base"] == pytest.approx(1.0)
    assert found["whole"] < 0.9
    assert found["memory"] == pytest.approx(0.0)


def test_table_has_a_row_for_each_size_and_a_column_for_each_stage():
    text = table(results())
    assert all(stage in text for stage in STAGES)
    assert all(f"by {axis}" in text for axis in growth.AXES)
    assert "10,000" in text
    assert "40,000 sessions 12.5 MiB" in text
    json.dumps(results())


def test_some_axes_and_stages_can_be_measured_alone(tmp_path):
    cells = [{"at": at, "stages": {stage: cost(at / 100) for stage in ("sbr", "score")}} for at in (100, 1000)]
    found = {"axes": {"items": cells}, "exponents": exponents({"items": cells}), "reader": []}
    text = table(found)
    assert "score" in text
    assert not any(word in text for word in ("align", "sessions", "reader"))
    pytest.importorskip("matplotlib")
    plot(found, tmp_path / "growth.svg")


def test_plot_is_the_same_bytes_for_the_same_results(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        plot(results(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()


def test_sizes_change_one_thing_at_a_time():
    base = Size(2000, 1000, 1)
    grid = sizes(base, quick=False)
    assert [size.sessions for size in grid["sessions"]] == [2000, 6000, 20000]
    assert [size.items for size in grid["items"]] == [1000, 10_000, 100_000]
    assert [size.ranks for size in grid["ranks"]] == [1, 2, 4]
    assert all(line[0] == base for line in grid.values())
    assert sizes(base, quick=False, times=(1, 5))["items"] == [base, Size(2000, 5000, 1)]


def test_a_bad_argument_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["growth", "--items", "3"])
    with pytest.raises(SystemExit) as ended:
        run_cli(growth.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --sessions must be 100 or more, and --items 32 or more\n"
    monkeypatch.setattr(sys, "argv", ["growth", "--times", "1,0"])
    with pytest.raises(SystemExit):
        run_cli(growth.main)
    error = "error: --times is 1,0; give whole numbers separated by commas, such as 1,10\n"
    assert capsys.readouterr().err == error


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_runs_at_two_sizes(tmp_path, monkeypatch, capsys):
    output = tmp_path / "growth.json"
    monkeypatch.setattr(sys, "argv", ["growth", "--quick", "--threads", "1", "--output", str(output)])
    run_cli(growth.main)
    found = json.loads(output.read_text())["results"]
    assert [cell["at"] for cell in found["axes"]["sessions"]] == [300, 900]
    for cell in found["axes"]["sessions"]:
        assert set(cell["stages"]) == set(STAGES)
        assert all(cost["process_mib"] > 50 for cost in cell["stages"].values())
    smallest, largest = (line["added_mib"] for line in found["reader"])
    assert largest < smallest + 10
    assert output.with_suffix(".svg").is_file()
    assert "by sessions" in capsys.readouterr().out

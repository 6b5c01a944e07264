import itertools
import json

from benchmarks.harness import Side, Spread, benchmark_parser, ratio, take_turns, write_report


def test_sides_take_turns_and_the_order_turns_round():
    seen = []
    sides = [Side("ours", lambda: seen.append("ours") or 1.0), Side("theirs", lambda: seen.append("theirs") or 1.0)]
    rates = take_turns(sides, rounds=3, warm_up=1)
    assert seen == ["ours", "theirs", "theirs", "ours", "ours", "theirs", "theirs", "ours"]
    assert {name: len(values) for name, values in rates.items()} == {"ours": 3, "theirs": 3}


def test_a_side_that_does_twice_the_units_has_twice_the_rate():
    ticks = itertools.count()
    sides = [Side("two", lambda: 2.0), Side("one", lambda: 1.0)]
    rates = take_turns(sides, rounds=3, clock=lambda: 0.5 * next(ticks))
    assert rates == {"two": [4.0] * 3, "one": [2.0] * 3}
    assert ratio(rates, "two", "one").median == 2.0


def test_ratio_is_taken_round_by_round():
    """A round in which the machine is slow for both sides does not move the ratio."""
    assert ratio({"a": [10.0, 2.0, 30.0], "b": [5.0, 1.0, 15.0]}, "a", "b") == Spread(2.0, 2.0, 2.0)


def test_spread_is_median_and_quartiles():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert str(Spread(1234.5, 1.0, 2.0)) == "1,234 [1 .. 2]"


def test_report_holds_settings_machine_and_results(tmp_path, capsys):
    path = tmp_path / "new" / "folder" / "x.json"
    write_report(str(path), {"rounds": 3}, {"ratio": 2.5})
    report = json.loads(path.read_text())
    assert report["settings"] == {"rounds": 3}
    assert report["results"] == {"ratio": 2.5}
    assert {"processor", "cores", "torch"} <= report["machine"].keys()
    assert str(path) in capsys.readouterr().out
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_parser_names_the_output_after_the_benchmark():
    assert benchmark_parser("topk", "Compares.").parse_args([]).output == "runs/benchmarks/topk.json"

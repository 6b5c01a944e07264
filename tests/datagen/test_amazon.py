"""The Amazon dumps of three years, with their own field names."""

from pathlib import Path
from typing import Any

import pytest

from datagen.amazon import convert, main
from llmgr_rec.errors import UserError
from tests.datagen.dumps import interactions, items, json_lines, leftovers, write

OLD_REVIEWS = [
    {"reviewerID": "A2", "asin": "B01", "reviewerName": "x", "helpful": [0, 0], "reviewText": "t", "overall": 5.0}
    | {"summary": "s", "unixReviewTime": 1391040000, "reviewTime": "01 30, 2014"},
    {"reviewerID": "A1", "asin": "B02", "overall": 2.0, "unixReviewTime": 1328140800, "reviewTime": "02 2, 2012"},
    {"reviewerID": "A2", "asin": "B02", "overall": 4.0, "unixReviewTime": 1318896000, "reviewTime": "10 18, 2011"},
]
OLD_ROWS = [("A1", "B02", 1328140800), ("A2", "B02", 1318896000), ("A2", "B01", 1391040000)]
# As the file of 2014 writes them: Python literals with single quotes, not JSON.
META_2014 = (
    "{'asin': 'B01', 'related': {'also_bought': ['B02']}, 'title': \"L&#39;Oreal  Men&amp;s Wash\", 'price': 7.5, "
    "'salesRank': {'Beauty': 3}, 'imUrl': 'http://x/y.jpg', 'brand': \"L'Oreal\", 'description': 'Soft <b>skin</b>.', "
    "'categories': [['Beauty', 'Skin Care', 'Face'], ['Beauty', 'Men&#39;s'], ['Beauty', 'Skin Care', 'Face']]}\n"
    "{'asin': 'B02', 'categories': [['Beauty']]}\n"
)
META_2018 = [
    {"category": ["All Beauty", "Tools &amp; More"], "description": ["First &quot;part&quot;.", "", "Second"]}
    | {"title": "Comb\n of <i>horn</i>", "brand": "Kent", "asin": "B01", "feature": [], "rank": "9", "price": "$5"},
    {
        "category": [],
        "description": [],
        "title": "var aPageStart = (new Date()).getTime();",
        "brand": "",
        "asin": "B02",
    },
    {"category": ["Twice"], "title": "Comb again", "asin": "B01"},
]
REVIEWS_2023 = [
    {"rating": 5.0, "title": "Nice", "text": "t", "images": [], "asin": "C1", "parent_asin": "P1", "user_id": "U"}
    | {"timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": True},
    {"rating": 1.0, "asin": "C9", "parent_asin": "P2", "user_id": "U", "timestamp": 1588687728000},
]
META_2023 = [
    {"main_category": "All Beauty", "title": "Brush", "average_rating": 4.8, "features": [], "description": ["a", "b"]}
    | {"price": None, "store": "Lurrose", "categories": [], "details": {"Brand": "Other"}, "parent_asin": "P1"},
    {"main_category": "All Beauty", "title": "Oil", "description": [], "store": None, "parent_asin": "P2"}
    | {"categories": ["Beauty", "Hair"], "details": {"Brand": "Argan"}},
]


def test_2014(tmp_path: Path) -> None:
    reviews = write(tmp_path / "reviews_Beauty_5.json", json_lines(OLD_REVIEWS))
    convert(2014, reviews, write(tmp_path / "meta_Beauty.json", META_2014), tmp_path / "out")
    assert interactions(tmp_path / "out") == OLD_ROWS
    assert items(tmp_path / "out") == [
        {
            "item_id": "B01",
            "title": "L'Oreal Men&s Wash",
            "category": "Beauty > Skin Care > Face | Beauty > Men's",
            "brand": "L'Oreal",
            "description": "Soft skin .",
        },
        {"item_id": "B02", "title": None, "category": "Beauty", "brand": None, "description": None},
    ]
    assert leftovers(tmp_path, "reviews_Beauty_5.json", "meta_Beauty.json", "out") == []


def test_2018_gzipped(tmp_path: Path) -> None:
    # As a pattern, the name would match the other file.
    folder = tmp_path / "reviewerID=7"
    write(folder / "Beauty1.json.gz", json_lines(OLD_REVIEWS[:1]))
    reviews = write(folder / "Beauty[1].json.gz", json_lines(OLD_REVIEWS))
    meta = write(tmp_path / "meta_All_Beauty.json.gz", json_lines(META_2018))
    main(["--year=2018", "--reviews", str(reviews), "--meta", str(meta), "--output", str(tmp_path / "out")])
    assert interactions(tmp_path / "out") == OLD_ROWS
    assert items(tmp_path / "out") == [
        {
            "item_id": "B01",
            "title": "Comb of horn",
            "category": "All Beauty > Tools & More",
            "brand": "Kent",
            "description": 'First "part". Second',
        },
        {"item_id": "B02", "title": None, "category": None, "brand": None, "description": None},
    ]


def test_2023(tmp_path: Path) -> None:
    reviews = write(tmp_path / "All_Beauty.jsonl", json_lines(REVIEWS_2023))
    meta = write(tmp_path / "meta_All_Beauty.jsonl.gz", json_lines(META_2023))
    convert(2023, reviews, meta, tmp_path / "out")
    assert interactions(tmp_path / "out") == [("U", "P2", 1588687728000), ("U", "P1", 1588687728923)]
    assert [(i["item_id"], i["category"], i["brand"], i["description"]) for i in items(tmp_path / "out")] == [
        ("P1", "All Beauty", "Lurrose", "a b"),
        ("P2", "Beauty > Hair", "Argan", None),
    ]


def test_min_rating(tmp_path: Path) -> None:
    reviews = write(tmp_path / "r.json", json_lines(OLD_REVIEWS))
    convert(2014, reviews, write(tmp_path / "m.json", META_2014), tmp_path / "out", min_rating=4.0)
    assert interactions(tmp_path / "out") == OLD_ROWS[1:]


def test_metadata_are_read_without_running_them(tmp_path: Path) -> None:
    meta = write(tmp_path / "m.json", "{'asin': __import__('os').mkdir('" + str(tmp_path / "ran") + "')}\n")
    with pytest.raises(UserError, match=r"m\.json: line 1 is not a Python literal"):
        convert(2014, write(tmp_path / "r.json", json_lines(OLD_REVIEWS)), meta, tmp_path / "out")
    assert leftovers(tmp_path, "r.json", "m.json") == []


def _bad(tmp_path: Path, year: int, reviews: str, meta: str, suffix: str = "") -> tuple[Any, ...]:
    return (
        year,
        write(tmp_path / f"r.json{suffix}", reviews),
        write(tmp_path / f"m.json{suffix}", meta),
        tmp_path / "out",
    )


@pytest.mark.parametrize(
    ("year", "reviews", "meta", "message"),
    [
        (
            2014,
            json_lines(OLD_REVIEWS),
            json_lines(META_2018) + "{'a': nul}\n",
            r"m\.json: line 4 is not a Python literal",
        ),
        (2018, json_lines(OLD_REVIEWS), META_2014, r"m\.json: line 1 is not a JSON object"),
        (2018, json_lines(OLD_REVIEWS), "[1]\n", r"m\.json: line 1 is a list, not an object"),
        (2018, json_lines(OLD_REVIEWS), json_lines(META_2023), r"m\.json: line 1: asin is missing; .* of 2018\?"),
        (2018, json_lines(REVIEWS_2023), json_lines(META_2018), r"r\.json: line 1: reviewerID is missing"),
        (2018, json_lines(OLD_REVIEWS) + '{"asin": \n', json_lines(META_2018), r"r\.json: .*Malformed JSON"),
        (2018, "", json_lines(META_2018), r"r\.json: nothing to convert: the file has no rows"),
        (2019, json_lines(OLD_REVIEWS), META_2014, r"--year is 2019; it must be one of 2014, 2018, 2023"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    tmp_path: Path, year: int, reviews: str, meta: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        convert(*_bad(tmp_path, year, reviews, meta))
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path, "r.json", "m.json") == []


@pytest.mark.parametrize("cut", ["r.json.gz", "m.json.gz"])
def test_a_download_cut_off_is_not_taken_for_a_whole_one(tmp_path: Path, cut: str) -> None:
    arguments = _bad(tmp_path, 2018, json_lines(OLD_REVIEWS * 400), json_lines(META_2018 * 400), ".gz")
    whole = (tmp_path / cut).read_bytes()
    (tmp_path / cut).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=cut.replace(".", r"\.")):
        convert(*arguments)
    assert leftovers(tmp_path, "r.json.gz", "m.json.gz") == []


def test_missing_files_are_named(tmp_path: Path) -> None:
    reviews = write(tmp_path / "r.json", json_lines(OLD_REVIEWS))
    with pytest.raises(UserError, match=r"--meta .*absent is not a file"):
        convert(2018, reviews, tmp_path / "absent", tmp_path / "out")
    with pytest.raises(UserError, match=r"--reviews .*absent is not a file"):
        convert(2018, tmp_path / "absent", reviews, tmp_path / "out")


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        (r"Comb \ud83d\ude00", "Comb \U0001f600"),
        (r"Comb \ud83d", "Comb \ufffd"),
        (r"\udfffComb\u0000 \ud800", "\ufffdComb\0 \ufffd"),
    ],
)
def test_half_a_character_is_replaced_in_texts(tmp_path: Path, title: str, expected: str) -> None:
    reviews = write(tmp_path / "reviews.json", json_lines(OLD_REVIEWS[:1]))
    meta = write(tmp_path / "meta.json", f'{{"asin": "B01", "title": "{title}", "category": ["a"]}}\n')
    convert(2018, reviews, meta, tmp_path / "out")
    assert items(tmp_path / "out")[0]["title"] == expected


@pytest.mark.parametrize("item_id", [r"B\ud83d", r"B\u0000"])
def test_an_id_that_cannot_be_stored_is_refused_with_its_row(tmp_path: Path, item_id: str) -> None:
    reviews = write(tmp_path / "reviews.json", json_lines(OLD_REVIEWS[:1]))
    meta = write(
        tmp_path / "meta.json", f'{{"asin": "B01", "category": []}}\n{{"asin": "{item_id}", "category": []}}\n'
    )
    with pytest.raises(UserError, match="row 2: the item id is 'B"):
        convert(2018, reviews, meta, tmp_path / "out")

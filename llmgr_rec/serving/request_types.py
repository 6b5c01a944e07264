"""Requests and answers of the service: their types, limits and examples, which OpenAPI shows."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from llmgr_rec.explanation.records import Click, Edge, ExplainedItem, Node

MAX_BODY_BYTES = 1 << 20
MAX_K = 200
MAX_CLICKS = 1000
MAX_SESSIONS = 100
MAX_ITEMS = 10_000
MAX_EXPLAINED = 20
_MAX_TEXT = 1000

ItemId = StrictInt | Annotated[StrictStr, Field(max_length=_MAX_TEXT)]
Session = Annotated[
    list[ItemId],
    Field(max_length=MAX_CLICKS, description="Ids of the clicked items, oldest first; unknown ids are ignored."),
]
K = Annotated[int, Field(ge=1, le=MAX_K, description="Maximum number of items of a list.")]
ModelName = Annotated[
    str | None,
    Field(max_length=_MAX_TEXT, description="Model of /health; by default that of the last stage."),
]


EXCLUDE_SEEN = Field(
    None, description="Whether items of the session are left out; null follows the rule of the training data."
)


class _Request(BaseModel):
    """A request; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class RecommendRequest(_Request):
    """Sessions to rank items for, and what may be recommended."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"sessions": [["pen", "ink"], ["paper"]], "k": 3, "without": ["clay"]}]}
    )
    sessions: Annotated[list[Session], Field(min_length=1, max_length=MAX_SESSIONS)]
    k: K = 10
    exclude_seen: bool | None = EXCLUDE_SEEN
    among: Annotated[list[ItemId], Field(max_length=MAX_ITEMS)] | None = Field(
        None, description="Ids of the items that may be recommended; null allows all."
    )
    without: Annotated[list[ItemId], Field(max_length=MAX_ITEMS)] = Field(
        [], description="Ids of items that are not recommended."
    )
    category: str | None = Field(
        None, max_length=_MAX_TEXT, description="Only items of this category, or of one below it."
    )
    domain: str | None = Field(
        None,
        max_length=_MAX_TEXT,
        description="For a model of several domains: items of this one, or of all; null takes that of each session.",
    )
    model: ModelName = None


class SimilarRequest(_Request):
    """Items to find similar ones of."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": ["pen"], "k": 3}]})
    items: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_SESSIONS)]
    k: K = 10
    model: ModelName = None


class ListsRequest(_Request):
    """One session, to see the lists of all models and baselines."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"session": ["pen", "ink"], "k": 5}]})
    session: Session
    k: K = 10


class ExplainRequest(_Request):
    """A session, and the items whose scores for it are explained."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"session": ["pen", "ink"], "items": ["paper"]}]})
    session: Session
    items: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_EXPLAINED)] | None = Field(
        None, description="Ids of the items; by default the first recommended ones."
    )
    k: Annotated[int, Field(ge=1, le=MAX_EXPLAINED, description="Number of recommended items.")] = 5
    exclude_seen: bool | None = EXCLUDE_SEEN
    model: ModelName = None


class RankedList(BaseModel):
    """Items of a session, best first."""

    item_ids: list[int | str]
    titles: list[str | None] = Field(description="Title of each item; null for an item without one.")
    scores: list[float]
    fallback: bool = Field(description="Whether no item of the session is known, so that these are the most popular.")


class RecommendAnswer(BaseModel):
    """One list a session, in their order."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "sbr",
                    "version": "0f3c1a9be2d4",
                    "lists": [
                        {
                            "item_ids": ["paper", "brush"],
                            "titles": ["a paper", "a brush"],
                            "scores": [7.25, 3.5],
                            "fallback": False,
                        }
                    ],
                }
            ]
        }
    )
    model: str
    version: str = Field(description="Changes with the content of the bundle that ranked.")
    lists: list[RankedList]


class SimilarItems(BaseModel):
    """The items with the most similar vectors, best first."""

    item_id: int | str
    item_ids: list[int | str]
    titles: list[str | None]
    scores: list[float] = Field(description="Cosine similarity.")


class SimilarAnswer(BaseModel):
    """One list an item, in their order."""

    model: str
    version: str
    lists: list[SimilarItems]


class ExplainAnswer(BaseModel):
    """What the scores of items rest on, as docs/explaining.md describes it."""

    model: str
    version: str
    format_version: int
    unknown_clicks: int
    unknown_items: list[int | str]
    stage: str
    fallback: bool
    clicks: list[Click]
    nodes: list[Node]
    edges: list[Edge]
    items: list[ExplainedItem]
    note: str


class Item(BaseModel):
    """An item of the catalog."""

    item_id: int | str
    title: str | None


class ItemsAnswer(BaseModel):
    """Items that were found, the most popular ones first."""

    items: list[Item]


class SessionItem(Item):
    """A click; the title of an unknown item is null."""

    is_known: bool


class NamedList(BaseModel):
    """The list of a model or baseline."""

    name: str
    title: str = Field(description="Name of the model or baseline for people.")
    item_ids: list[int | str]
    titles: list[str | None]
    scores: list[float] | None = Field(description="Null for a baseline.")
    fallback: bool = Field(description="Whether no item of the session is known, so that these are the most popular.")
    explains: bool = Field(description="Whether /explain takes the name as its model.")


class ListsAnswer(BaseModel):
    """The session with titles, and the list of each model and baseline."""

    session: list[SessionItem]
    lists: list[NamedList]


class LoadedModel(BaseModel):
    """A loaded model."""

    name: str
    title: str
    stage: str
    version: str


class HealthAnswer(BaseModel):
    """What is loaded."""

    status: str
    num_items: int
    default: str = Field(description="The model that answers if none is named.")
    models: list[LoadedModel]


class ErrorAnswer(BaseModel):
    """One line that says what is wrong and how to fix it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"error": "k is 5000; give 200 at most"}]})
    error: str


ERRORS: dict[int | str, dict[str, Any]] = {
    413: {"model": ErrorAnswer, "description": "The body is too large."},
    422: {"model": ErrorAnswer, "description": "The request is wrong; the line says how to fix it."},
    503: {"model": ErrorAnswer, "description": "Too many requests wait; try again after a moment."},
}

"""Synthetic sessions with known transition rules by id and by title, and the hit rate of an optimal predictor.

Shape suffixes: V items, G themes, F successors of an item in the transition table, B sessions of a chunk, L clicks of a
chunk, K top-ranked items.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

THEME_SIZE = 16
"""Maximum number of items per theme. With the four table successors they fill a list of 20, so HR@20 can reach 1."""
SUCCESSOR_SHARES = (0.5, 0.25, 0.15, 0.1)
"""Probability of each successor in the transition table."""
CHUNK_SESSIONS = 1 << 16
"""Sessions per random stream. Another value gives other sessions for the same seed."""
SHORTEST_SESSION = 5
CHUNK_ITEMS = 1 << 20
"""Items whose texts are in memory together."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NOUNS = _words(
    "Amber Anchor Apple Arrow Autumn Bamboo Banner Basket Beacon Birch Blossom Bridge Bronze Butter Cabin Candle "
    "Canyon Castle Cedar Cherry Circle Clover Coast Comet Copper Coral Cotton Crystal Desert Diamond Dolphin "
    "Dragon Eagle Ember Falcon Feather Fern Field Flame Forest Fountain Fox Garden Ginger Glacier Granite Grove "
    "Harbor Harvest Hazel Honey Horizon Iron Island Ivory Ivy Jade Jasmine Jungle Kettle Lagoon Lantern Laurel "
    "Lemon Lily Linen Lion Lotus Magnet Mango Maple Marble Meadow Melon Meteor Mirror Mist Moon Mountain Nectar "
    "Nest North Oak Ocean Olive Onyx Opal Orbit Orchid Otter Palace Palm Pearl Pepper Piano Pine Planet Plum "
    "Prairie Quartz Rain Raven Ribbon River Rocket Rose Ruby Saddle Sail Salmon Sapphire Shadow Shell Silver Sky "
    "Snow Spruce Star Stone Storm Summer Sun Thunder Tiger Topaz Tower Tulip Valley Velvet Violet Walnut Water "
    "Willow Window Winter Wolf Zebra "
)
_QUALITIES = _words(
    "bright calm classic compact deluxe elegant everyday gentle light modern plain rustic smooth soft solid warm"
)
_THINGS = _words("bag bowl brush case chair clock cup frame jar knife lamp mat mug pen plate rack shelf soap tray vase")
_ROOMS = ("Home > Kitchen", "Home > Bath", "Home > Bedroom", "Outdoor > Patio", "Outdoor > Tools", "Office > Desk")
_MAKERS = _words("Acorn Bolt Crest Delta Everly Fable Grant Hollis Inkwell Juno Kepler Larch")


@dataclass(frozen=True)
class Planted:
    """Transition rules of the synthetic data.

    Attributes:
        text_share: Probability that a step follows the title of the previous item instead of the transition table.
        mean_length: Mean clicks per session.
        seed: Seed of all draws.
        theme_V: Theme of each item, which is the first word of its title.
        pointer_V: Theme of the items that follow each item by title, which is the last word of its title.
        successors_VF: Distinct successors in the transition table, most likely first. All of them are common items.
        common: Items that may be successors and first clicks. The others are rare.
        members_V: Items sorted by theme.
        theme_offsets_G1: Offset of each theme in `members_V`.
    """

    text_share: float
    mean_length: float
    seed: int
    theme_V: Ints
    pointer_V: Ints
    successors_VF: Ints
    common: Ints
    members_V: Ints
    theme_offsets_G1: Ints

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.theme_V)

    @property
    def theme_sizes_G(self) -> Ints:
        """Number of items of each theme."""
        return np.diff(self.theme_offsets_G1)


def plant(items: int, mean_length: float, text_share: float, rare_share: float, seed: int) -> Planted:
    """Draws the rules.

    Args:
        items: Number of items, at least 32.
        mean_length: Mean clicks per session, at least 2.
        text_share: Share of the steps that only titles explain.
        rare_share: Share of items that are neither successors in the transition table nor first clicks, and so are
            reached through titles only.
        seed: Seed of all draws.
    """
    rng = np.random.default_rng([seed, 0])
    themes = -(-items // THEME_SIZE)
    theme_V = rng.permutation(np.arange(items) % themes)
    pointer_V = rng.permutation(np.arange(items) % themes)
    common = rng.permutation(items)[: max(len(SUCCESSOR_SHARES) + 1, round(items * (1 - rare_share)))]
    width = len(SUCCESSOR_SHARES)
    picks_VF = rng.integers(len(common), size=(items, width))
    while True:
        sorted_VF = np.sort(picks_VF, axis=1)
        repeated = np.flatnonzero((sorted_VF[:, 1:] == sorted_VF[:, :-1]).any(axis=1))
        if not len(repeated):
            break
        picks_VF[repeated] = rng.integers(len(common), size=(len(repeated), width))
    members_V = np.argsort(theme_V, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(theme_V, minlength=themes))])
    return Planted(
        text_share, mean_length, seed, theme_V, pointer_V, common[picks_VF], common, members_V, offsets.astype(np.int64)
    )


def sessions(world: Planted, count: int) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Draws `count` sessions in chunks of `CHUNK_SESSIONS`.

    Yields:
        items_L (item indices of all sessions, concatenated), offsets_B1 (offset of each session) and timestamps_L
        (seconds, increasing within a session).
    """
    for chunk, first in enumerate(range(0, count, CHUNK_SESSIONS)):
        rng = np.random.default_rng([world.seed, 1, chunk])
        yield _chunk(world, min(CHUNK_SESSIONS, count - first), rng)


def _chunk(world: Planted, size: int, rng: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    shortest = min(SHORTEST_SESSION, int(world.mean_length))
    lengths_B = shortest + rng.poisson(world.mean_length - shortest, size=size)
    # Longest first, so that the sessions still active at step t are a prefix, which needs no mask.
    order_B = np.argsort(-lengths_B, kind="stable")
    active_T = size - np.searchsorted(np.sort(lengths_B), np.arange(lengths_B.max()), side="right")
    walked_TB = np.zeros((len(active_T), size), dtype=np.int64)
    walked_TB[0] = world.common[rng.integers(len(world.common), size=size)]
    for step in range(1, len(active_T)):
        walked_TB[step, : active_T[step]] = next_items(world, walked_TB[step - 1, : active_T[step]], rng)
    in_order_BT = np.empty((size, len(active_T)), dtype=np.int64)
    in_order_BT[order_B] = walked_TB.T
    items_L = in_order_BT[np.arange(len(active_T)) < lengths_B[:, None]]
    offsets_B1 = np.concatenate([[0], np.cumsum(lengths_B)]).astype(np.int64)
    starts_B = 1_500_000_000 + rng.integers(31_536_000, size=size)
    elapsed_L = np.cumsum(rng.integers(5, 120, size=len(items_L)))
    timestamps_L = np.repeat(starts_B - elapsed_L[offsets_B1[:-1]], lengths_B) + elapsed_L
    return items_L, offsets_B1, timestamps_L


def next_items(world: Planted, previous_B: Ints, rng: np.random.Generator) -> Ints:
    """Draws the click after each of `previous_B`, by title with probability `text_share`, else by the table."""
    by_text_B = rng.random(len(previous_B)) < world.text_share
    draw_B = rng.random(len(previous_B))
    pointer_B = world.pointer_V[previous_B]
    within_B = (draw_B * world.theme_sizes_G[pointer_B]).astype(np.int64)
    text_B = world.members_V[world.theme_offsets_G1[pointer_B] + within_B]
    column_B = np.searchsorted(np.cumsum(SUCCESSOR_SHARES)[:-1], draw_B, side="right")
    return np.where(by_text_B, text_B, world.successors_VF[previous_B, column_B])


def theme_word(theme: int) -> str:
    """The word of a theme in titles; distinct for distinct numbers."""
    word = _NOUNS[theme % len(_NOUNS)]
    while theme := theme // len(_NOUNS):
        word += _NOUNS[theme % len(_NOUNS)].lower()
    return word


def item_id(item: int) -> str:
    """Id of an item in the files."""
    return f"i{item:08d}"


def item_texts(world: Planted, shuffle_titles: bool) -> Iterator[dict[str, list[str]]]:
    """Columns of items.parquet, in ranges of `CHUNK_ITEMS` items.

    Only the title follows the rules: "Harbor soft lamp and tray for Meadow" has theme Harbor and leads to theme Meadow.
    Category, brand and description are independent of it, so side features cannot replace the title.

    Args:
        world: The rules.
        shuffle_titles: Randomly permutes the titles among the items, as a control in which titles are uninformative.
    """
    rng = np.random.default_rng([world.seed, 2])
    count = world.num_items

    def draw(words: tuple[str, ...]) -> NDArray[np.int8]:
        return rng.integers(len(words), size=count).astype(np.int8)

    names = [theme_word(theme) for theme in range(len(world.theme_sizes_G))]
    qualities, things, others, rooms, makers = (draw(w) for w in (_QUALITIES, _THINGS, _THINGS, _ROOMS, _MAKERS))
    order = rng.permutation(count) if shuffle_titles else np.arange(count)

    def title(item: int) -> str:
        words = _QUALITIES[qualities[item]], _THINGS[things[item]], _THINGS[others[item]]
        return f"{names[world.theme_V[item]]} {words[0]} {words[1]} and {words[2]} for {names[world.pointer_V[item]]}"

    def description(item: int) -> str:
        return f"A {_QUALITIES[qualities[item]]} {_THINGS[things[item]]} made by {_MAKERS[makers[item]]}."

    for first in range(0, count, CHUNK_ITEMS):
        items = range(first, min(first + CHUNK_ITEMS, count))
        yield {
            "item_id": [item_id(item) for item in items],
            "title": [title(order[item]) for item in items],
            "category": [_ROOMS[rooms[item]] for item in items],
            "brand": [_MAKERS[makers[item]] for item in items],
            "description": [description(item) for item in items],
        }


def oracle_hit_rate(world: Planted, count: int, k: int = 20) -> dict[str, float]:
    """Expected HR@k of the last click of the sessions, for optimal predictors with increasing knowledge.

    All predictors know the transition table. As in a leave-one-out split, they learn from all clicks except the last
    two of each session. Remaining list positions are filled with random other items, which count with their probability
    of being correct.

    Args:
        world: The rules.
        count: Number of sessions, as given to `sessions`.
        k: List length.

    Returns:
        Hit rate by predictor. "table": knows the transition table only. "pairs": also knows the pairs of the title rule
        observed in training, as co-occurrence models do (item-kNN, Markov chains). "ids": also knows everything that
        can be inferred from these pairs (items with a common successor lead to the same theme), an upper bound for
        models without text. "ids_and_text": also knows the titles.
    """
    pairs, last_counts_V = _training_pairs(world, count)
    known = {
        "table": np.zeros((world.num_items, THEME_SIZE), dtype=bool),
        "pairs": _seen_members(world, pairs),
        "ids": _deducible_members(world, pairs),
        "ids_and_text": np.ones((world.num_items, THEME_SIZE), dtype=bool),
    }
    weights_V = last_counts_V / last_counts_V.sum()
    return {name: float(weights_V @ _hit_rate(world, members, k)) for name, members in known.items()}


def _training_pairs(world: Planted, count: int) -> tuple[Ints, Ints]:
    """Distinct training pairs (item, next item) of the title rule [2, P], and counts [V] as second-to-last click."""
    codes: list[Ints] = []
    last_counts_V = np.zeros(world.num_items, dtype=np.int64)
    for items_L, offsets_B1, _ in sessions(world, count):
        last_counts_V += np.bincount(items_L[offsets_B1[1:] - 2], minlength=world.num_items)
        trained_L = np.ones(len(items_L), dtype=bool)
        for back in (1, 2, 3):
            # The successor of a pair must be before the two held-out clicks.
            trained_L[np.maximum(offsets_B1[1:] - back, offsets_B1[:-1])] = False
        start = np.flatnonzero(trained_L)
        previous, following = items_L[start], items_L[start + 1]
        is_text = (world.theme_V[following] == world.pointer_V[previous]) & ~(
            world.successors_VF[previous] == following[:, None]
        ).any(axis=1)
        codes.append(np.unique(previous[is_text] * world.num_items + following[is_text]))
    unique = np.unique(np.concatenate(codes))
    return np.stack([unique // world.num_items, unique % world.num_items]), last_counts_V


def _rank_in_theme(world: Planted) -> Ints:
    """Rank of each item among the members of its theme."""
    rank_V = np.empty(world.num_items, dtype=np.int64)
    rank_V[world.members_V] = np.arange(world.num_items) - np.repeat(world.theme_offsets_G1[:-1], world.theme_sizes_G)
    return rank_V


def _seen_members(world: Planted, pairs: Ints) -> NDArray[np.bool_]:
    known = np.zeros((world.num_items, THEME_SIZE), dtype=bool)
    known[pairs[0], _rank_in_theme(world)[pairs[1]]] = True
    return known


def _deducible_members(world: Planted, pairs: Ints) -> NDArray[np.bool_]:
    """Members of the next theme of each item that are connected to the item in the graph of observed pairs."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = world.num_items
    # Each item is two nodes: one as the first of a pair, one as the second.
    graph = coo_array(
        (np.ones(pairs.shape[1], dtype=np.int8), (pairs[0], pairs[1] + count)), shape=(2 * count, 2 * count)
    )
    _, component = connected_components(graph, directed=False)
    sizes_V = world.theme_sizes_G[world.pointer_V]
    columns = np.arange(THEME_SIZE)
    place = world.theme_offsets_G1[world.pointer_V][:, None] + np.minimum(columns, sizes_V[:, None] - 1)
    known: NDArray[np.bool_] = component[world.members_V[place] + count] == component[:count, None]
    return known & (columns < sizes_V[:, None])


def _hit_rate(world: Planted, known: NDArray[np.bool_], k: int) -> Floats:
    """Probability [V] that the best list of k has the item's successor, given the known members of its next theme."""
    sizes_V = world.theme_sizes_G[world.pointer_V]
    each_V = world.text_share / sizes_V
    follows_theme_VF = world.theme_V[world.successors_VF] == world.pointer_V[:, None]
    table_VF = (1 - world.text_share) * np.array(SUCCESSOR_SHARES) + follows_theme_VF * each_V[:, None]
    columns = np.arange(THEME_SIZE)
    exists = columns < sizes_V[:, None]
    rank_V = _rank_in_theme(world)
    for column in range(world.successors_VF.shape[1]):
        rows = np.flatnonzero(follows_theme_VF[:, column])
        exists[rows, rank_V[world.successors_VF[rows, column]]] = False
    unknown_V = (exists & ~known).sum(axis=1)
    others_V = np.maximum(world.num_items - table_VF.shape[1] - (exists & known).sum(axis=1), 1)
    guess_VK = np.repeat((unknown_V * each_V / others_V)[:, None], k, axis=1)
    chances = np.concatenate([table_VF, np.where(exists & known, each_V[:, None], 0.0), guess_VK], axis=1)
    best_V: Floats = -np.sort(-chances, axis=1)[:, :k].sum(axis=1)
    return best_V

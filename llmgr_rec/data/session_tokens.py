"""Sessions as text: what was clicked, one text after the other, each closed by the token at which it is read.

Shapes: V items, B sessions, L clicks, S tokens, X places.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmgr_rec.data.jagged import Jagged, lengths_to_offsets


@dataclass(frozen=True)
class Texts:
    """Rows of tokens, and where they are read.

    Args:
        tokens: Token ids, one row a session or an item.
        places_X: Positions in the flat tokens after which the reader is asked, in rising order.
    """

    tokens: Jagged
    places_X: Tensor


def closed(texts: Jagged, end: int) -> Jagged:
    """Texts with one more token each, so that one without words has a place to be read, too.

    Args:
        texts: Token ids, one row an item.
        end: The token that closes them.
    """
    ends = Jagged(torch.full((texts.num_rows,), end), torch.arange(texts.num_rows + 1))
    return Jagged.beside([texts, ends])


def item_texts(texts: Jagged, items: Tensor) -> Texts:
    """Items alone, read at their ends.

    Args:
        texts: From `closed`, one row an item of the catalog.
        items: Which items.
    """
    tokens = texts.select(items)
    return Texts(tokens, tokens.offsets[1:] - 1)


def session_texts(texts: Jagged, clicks: Jagged) -> Texts:
    """Sessions, read after each click: X = L.

    Args:
        texts: From `closed`, one row an item of the catalog.
        clicks: Items of each session, oldest first.
    """
    by_click = texts.select(clicks.values)
    return Texts(Jagged(by_click.values, by_click.offsets[clicks.offsets]), by_click.offsets[1:] - 1)


def last_places(texts: Texts) -> Texts:
    """The same rows, none of them empty, read at their ends alone."""
    return Texts(texts.tokens, texts.tokens.offsets[1:] - 1)


def drop_tokens(texts: Texts, share: float) -> Texts:
    """Leaves tokens out at random, but none that is read, so that no wording is learned by heart.

    Args:
        texts: Rows of tokens.
        share: Share that is left out, 0 to 1; drawn by torch's own generator.
    """
    tokens = texts.tokens
    is_kept_S = torch.rand(tokens.values.numel()) >= share
    is_kept_S[texts.places_X] = True
    kept_before = lengths_to_offsets(is_kept_S.long())
    return Texts(Jagged(tokens.values[is_kept_S], kept_before[tokens.offsets]), kept_before[texts.places_X])


def newest(sessions: Jagged, most: int) -> Jagged:
    """The last `most` clicks of each session."""
    spare_B = (sessions.lengths - most).clamp(min=0)
    return sessions.gather(sessions.offsets[:-1] + spare_B, sessions.lengths - spare_B)

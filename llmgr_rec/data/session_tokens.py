"""Token sequences of sessions: the concatenated texts of the clicked items, each with an end token.

A language model encodes a sequence; its hidden states at the end tokens represent the session up to that click.

Shapes: V items, B sessions, L clicks, S tokens of all sequences, X output positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmgr_rec.data.jagged import Jagged, lengths_to_offsets


@dataclass(frozen=True)
class TokenSequences:
    """Token sequences and the positions at which hidden states are used.

    Args:
        tokens: Token ids, int64, one row per session or item.
        positions_X: Positions in the concatenated tokens, int64, in ascending order.
    """

    tokens: Jagged
    positions_X: Tensor


def append_token(texts: Jagged, token: int) -> Jagged:
    """Appends the end token to each text, so that an empty text has an output position, too.

    Args:
        texts: Token ids, one row per item.
        token: Token id.
    """
    ends = Jagged(torch.full((texts.num_rows,), token), torch.arange(texts.num_rows + 1))
    return Jagged.concatenate([texts, ends])


def item_sequences(texts: Jagged, items: Tensor) -> TokenSequences:
    """One sequence per item, with its last token as output position.

    Args:
        texts: Token ids from `append_token`, one row per item of the catalog.
        items: Item indices, int64.
    """
    tokens = texts.select(items)
    return TokenSequences(tokens, tokens.offsets[1:] - 1)


def session_sequences(texts: Jagged, clicks: Jagged) -> TokenSequences:
    """One sequence per session, with the end token of each click as output position (X = L).

    Args:
        texts: Token ids from `append_token`, one row per item of the catalog.
        clicks: Item indices of each session, oldest first.
    """
    by_click = texts.select(clicks.values)
    return TokenSequences(Jagged(by_click.values, by_click.offsets[clicks.offsets]), by_click.offsets[1:] - 1)


def last_positions(texts: TokenSequences) -> TokenSequences:
    """The same sequences with only the last token of each as output position. No sequence may be empty."""
    return TokenSequences(texts.tokens, texts.tokens.offsets[1:] - 1)


def drop_tokens(texts: TokenSequences, share: float) -> TokenSequences:
    """Removes random tokens as regularization against overfitting to item texts. Output positions are never removed.

    Args:
        texts: Token sequences.
        share: Probability that a token is removed, 0 to 1. Uses torch's default generator.
    """
    tokens = texts.tokens
    is_kept_S = torch.rand(tokens.values.numel()) >= share
    is_kept_S[texts.positions_X] = True
    kept_before = lengths_to_offsets(is_kept_S.long())
    return TokenSequences(Jagged(tokens.values[is_kept_S], kept_before[tokens.offsets]), kept_before[texts.positions_X])


def last_clicks(sessions: Jagged, count: int) -> Jagged:
    """The last `count` clicks of each session; shorter sessions are unchanged."""
    dropped_B = (sessions.lengths - count).clamp(min=0)
    return sessions.gather(sessions.offsets[:-1] + dropped_B, sessions.lengths - dropped_B)

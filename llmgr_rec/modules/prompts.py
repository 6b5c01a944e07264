"""Prompts: a template becomes token ids once, and the layout of a batch is made by tensor operations.

Shapes: B sessions, L clicks, N nodes, M soft node tokens of all prompts, P tokens of the shared prefix, T tokens of the
longest prompt after the prefix, S flat text tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.prompt_files import PromptTemplate, Task

NodeOrder = Literal["clicks", "unique"]


@dataclass
class PromptLayout:
    """Where everything stands in the prompts of a batch, after their shared prefix; padded on the right.

    Args:
        prefix_P: Token ids that every prompt starts with; may be empty.
        token_ids_BT: Token ids; 0 at soft places and padding.
        soft_rows_BT: Row of the soft matrix that stands here: b for the graph of session b, B + m for the m-th node
            token of the batch; -1 at ordinary tokens and padding.
        lengths_B: Tokens of each prompt after the prefix, at least 1.
    """

    prefix_P: Tensor
    token_ids_BT: Tensor
    soft_rows_BT: Tensor
    lengths_B: Tensor


class CompiledPrompt(nn.Module):
    """A template as token ids: the prefix before the first place, then constants and places in turn.

    Args:
        prefix: Token ids of the constant start.
        segments: Token ids of a constant, or the name of a place, in order.
    """

    prefix_P: Tensor

    def __init__(self, prefix: list[int], segments: list[list[int] | str]) -> None:
        super().__init__()
        self.register_buffer("prefix_P", torch.tensor(prefix, dtype=torch.int64), persistent=False)
        self.segments: list[str] = []
        for number, segment in enumerate(segments):
            if isinstance(segment, str):
                self.segments.append(segment)
            else:
                name = f"constant{number}"
                self.register_buffer(name, torch.tensor(segment, dtype=torch.int64), persistent=False)
                self.segments.append(name)

    @property
    def uses_text(self) -> bool:
        """Whether text has a place in this prompt."""
        return "text" in self.segments

    def forward(self, nodes: Jagged, text: Jagged) -> PromptLayout:
        """Lays out the prompts of a batch.

        Args:
            nodes: One row a session; only its row lengths matter here.
            text: Token ids at {text}, one row a session; not read where the prompt has no such place.

        Returns:
            The layout.
        """
        starts, total_B = self._starts(nodes, text)
        num_sessions, longest = total_B.numel(), int(total_B.max())
        token_ids_BT = total_B.new_zeros(num_sessions, longest)
        soft_rows_BT = torch.full_like(token_ids_BT, -1)
        for segment, start_B in zip(self.segments, starts, strict=True):
            if segment == "graph":
                sessions = torch.arange(num_sessions, device=start_B.device)
                soft_rows_BT[sessions, start_B] = sessions
            elif segment == "nodes":
                rows = torch.arange(nodes.values.numel(), device=start_B.device) + num_sessions
                _place(soft_rows_BT, start_B, nodes, rows)
            elif segment == "text":
                _place(token_ids_BT, start_B, text, text.values)
            else:
                constant = self.get_buffer(segment)
                columns = start_B.unsqueeze(1) + torch.arange(constant.numel(), device=start_B.device)
                token_ids_BT.scatter_(1, columns, constant.expand(num_sessions, -1))
        return PromptLayout(self.prefix_P, token_ids_BT, soft_rows_BT, total_B)

    def _starts(self, nodes: Jagged, text: Jagged) -> tuple[list[Tensor], Tensor]:
        """Column at which each segment starts in each prompt, and the prompts' lengths."""
        column_B = torch.zeros_like(nodes.lengths)
        starts = []
        for segment in self.segments:
            starts.append(column_B)
            if segment == "nodes":
                column_B = column_B + nodes.lengths
            elif segment == "text":
                column_B = column_B + text.lengths
            else:
                column_B = column_B + (1 if segment == "graph" else self.get_buffer(segment).numel())
        return starts, column_B


class PromptSet(nn.ModuleDict):
    """A compiled prompt for each task, called as one module: TorchRec's tracing stops at it."""

    def __init__(self, prompts: Mapping[Task, CompiledPrompt]) -> None:
        super().__init__({str(task): prompt for task, prompt in prompts.items()})

    def forward(self, task: Task, nodes: Jagged, text: Jagged) -> PromptLayout:
        """Lays out the prompts of a batch, see `CompiledPrompt.forward`."""
        layout: PromptLayout = self[task](nodes, text)
        return layout


def compile_prompt(
    template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, with_text: bool = True
) -> CompiledPrompt:
    """Turns a template into token ids.

    The prompt starts with whatever the tokenizer puts in front of a text (LLaMA's <s>). Constants are tokenised each by
    itself, so a layout never re-tokenises.

    Args:
        template: The template.
        tokenizer: The language model's tokenizer.
        with_text: Whether text is shown at {text}.
    """
    parts = list(template.segments(with_text))
    prefix = _leading_special_tokens(tokenizer) + _tokens(parts[0], tokenizer)
    segments: list[list[int] | str] = []
    for place, constant in zip(parts[1::2], parts[2::2], strict=True):
        segments.append(place)
        if ids := _tokens(constant, tokenizer):
            segments.append(ids)
    return CompiledPrompt(prefix, segments)


def prompt_nodes(graph: SessionGraph, order: NodeOrder, max_nodes: int) -> Jagged:
    """Nodes that the prompts show, as rows of the batch's node vectors.

    Args:
        graph: The sessions' graphs.
        order: Clicks in order with repeats, or each distinct item once in order of its last click.
        max_nodes: Newest ones kept of each session; 0 keeps all.

    Returns:
        Global node index of each shown node, oldest first, one row a session.
    """
    click_L = torch.arange(graph.alias_L.numel(), device=graph.alias_L.device)
    session_L = graph.click_session_L
    shown_L = torch.ones_like(click_L, dtype=torch.bool)
    if order == "unique":
        last_click_N = torch.zeros_like(graph.node_items_N)
        # Clicks stand in order of time, so the largest click number of a node is its last.
        last_click_N.scatter_reduce_(0, graph.alias_L, click_L, "amax", include_self=False)
        shown_L = last_click_N[graph.alias_L] == click_L
    if max_nodes:
        shown_to_end_L1 = torch.cat([shown_L.new_zeros(1, dtype=torch.int64), shown_L.cumsum(0)])
        newer_L = shown_to_end_L1[graph.click_offsets_B1[1:]][session_L] - shown_to_end_L1[1:]
        shown_L = shown_L & (newer_L < max_nodes)
    lengths_B = torch.zeros_like(graph.click_offsets_B1[1:]).index_add_(0, session_L, shown_L.to(torch.int64))
    return Jagged.from_lengths(graph.alias_L[shown_L], lengths_B)


def _place(target_BT: Tensor, start_B: Tensor, rows: Jagged, values_S: Tensor) -> None:
    """Writes flat values into their prompts, row b from column start_B[b] on."""
    row_S = rows.row_of_value
    column_S = torch.arange(row_S.numel(), device=row_S.device) + (start_B - rows.offsets[:-1])[row_S]
    target_BT[row_S, column_S] = values_S


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer puts in front of any text, found by encoding one."""
    with_special, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for count in range(len(with_special) - len(plain) + 1):
        if with_special[count : count + len(plain)] == plain:
            return with_special[:count]
    return []

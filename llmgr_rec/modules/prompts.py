"""Prompts: a template becomes token ids once, and the prompts of a batch are packed by tensor operations.

Shapes: B prompts, C outputs, L clicks, N nodes, P tokens of the shared prefix (or passes, in `pass_offsets_P1`), X
tokens of all prompts after it.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.prompt_templates import PromptTemplate, Task
from llmgr_rec.kernels.prompt_packing import PackedPrompts

NodeOrder = Literal["clicks", "unique"]


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
    def supports_one_pass(self) -> bool:
        """Whether everything that differs between the prefixes of a session comes after its nodes."""
        return self.segments[:1] == ["nodes"]

    def forward(self, nodes: Jagged, text: Jagged, pass_offsets_P1: Tensor | None = None) -> PackedPrompts:
        """Packs the prompts of a batch.

        Args:
            nodes: One row a prompt; only the row lengths matter here.
            text: Token ids at {text}, one row an output; ignored where the prompt has no such place.
            pass_offsets_P1: First output of each pass, and last their number, int64: the outputs of a pass belong to
                the prefixes of one row of nodes, each one node longer than the one before. None gives each output a
                prompt of its own.

        Returns:
            The tokens. Rows of the soft matrix: c for the graph of output c, then C + m for node m of `nodes`.

        Raises:
            ValueError: Passes were given, but something that differs between prefixes comes before the nodes.
        """
        if pass_offsets_P1 is None:
            count = nodes.num_rows
            return PackedPrompts.separate(self.prefix_P, self._lay_out(self.segments, count, count, nodes, text))
        if not self.supports_one_pass:
            raise ValueError("prefixes can be encoded in one pass only if {nodes} is the first place of the template")
        count = nodes.values.numel()
        contexts = self._lay_out(["nodes"], nodes.num_rows, count, nodes, text)
        suffixes = self._lay_out(self.segments[1:], count, count, nodes, text)
        return PackedPrompts.in_one_pass(self.prefix_P, contexts, suffixes)

    def _lay_out(self, segments: list[str], rows: int, readings: int, nodes: Jagged, text: Jagged) -> Jagged:
        """Tokens of some segments, row by row: a token id, or -1 - s for row s of the soft matrix."""
        device = nodes.offsets.device
        parts = [Jagged(text.values[:0], torch.zeros(rows + 1, dtype=torch.int64, device=device))]
        for segment in segments:
            if segment == "nodes":
                soft_rows = torch.arange(nodes.values.numel(), device=device) + readings
                parts.append(Jagged(-1 - soft_rows, nodes.offsets))
            elif segment == "text":
                parts.append(text)
            elif segment == "graph":
                graphs = torch.arange(rows + 1, device=device)
                parts.append(Jagged(-1 - graphs[:-1], graphs))
            else:
                constant = self.get_buffer(segment)
                starts = torch.arange(rows + 1, device=device) * constant.numel()
                parts.append(Jagged(constant.repeat(rows), starts))
        return Jagged.beside(parts)


class PromptSet(nn.ModuleDict):
    """A compiled prompt for each task, called as one module: TorchRec's tracing stops at it."""

    def __init__(self, prompts: Mapping[Task, CompiledPrompt]) -> None:
        super().__init__({str(task): prompt for task, prompt in prompts.items()})

    def forward(self, task: Task, nodes: Jagged, text: Jagged, pass_offsets_P1: Tensor | None = None) -> PackedPrompts:
        """Packs the prompts of a batch, see `CompiledPrompt.forward`."""
        packed: PackedPrompts = self[task](nodes, text, pass_offsets_P1)
        return packed


def compile_prompt(
    template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, with_text: bool = True
) -> CompiledPrompt:
    """Turns a template into token ids.

    The prompt starts with whatever the tokenizer puts in front of a text (LLaMA's <s>). Constants are tokenized each by
    itself, so a layout never re-tokenizes.

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


def one_pass_nodes(graph: SessionGraph, pass_offsets_P1: Tensor) -> Jagged:
    """Nodes of one prompt for each pass: as many of the longest prefix's last clicks as the pass has prefixes.

    Args:
        graph: Graphs of the prefixes.
        pass_offsets_P1: First prefix of each pass; each prefix is one click longer than the one before.

    Returns:
        Global node index, in the longest prefix's graph, of each shown click, one row a prompt.
    """
    lengths_P = pass_offsets_P1[1:] - pass_offsets_P1[:-1]
    ends_P = graph.click_offsets_B1[pass_offsets_P1[1:]]
    clicks = Jagged(graph.alias_L, graph.click_offsets_B1)
    return clicks.gather(ends_P - lengths_P, lengths_P, total=graph.num_sessions)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer puts in front of any text, found by encoding one."""
    with_special, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for count in range(len(with_special) - len(plain) + 1):
        if with_special[count : count + len(plain)] == plain:
            return with_special[:count]
    return []

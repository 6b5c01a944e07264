"""Prompts: templates are tokenized once, and the prompts of a batch are packed by tensor operations.

Shapes: B sessions, C outputs, L clicks, N nodes, P tokens of the shared prefix (or passes, in `pass_offsets_P1`), X
tokens of all prompts after it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.prompt_templates import PromptTemplate, Task
from llmgr_rec.kernels.prompt_packing import PackedPrompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NodeOrder = Literal["clicks", "unique"]


class CompiledPrompt(nn.Module):
    """A tokenized template: the prefix before the first placeholder, then constants and placeholders in turn.

    Args:
        prefix: Token ids of the prefix, the same for all prompts.
        segments: Token ids of a constant, or the name of a placeholder (`graph`, `nodes` or `text`), in order.
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
        """Whether the nodes come first, so that prefixes of a session can share their tokens."""
        return self.segments[:1] == ["nodes"]

    def forward(self, nodes: Jagged, text: Jagged, pass_offsets_P1: Tensor | None = None) -> PackedPrompts:
        """Packs the prompts of a batch.

        Args:
            nodes: Nodes of the prompts, one row per prompt; only the row lengths are used.
            text: Token ids at the placeholder {text}, one row per output; ignored if the template does not have it.
            pass_offsets_P1: First output of each pass and, last, the number of outputs, int64. The outputs of a pass
                are the prefixes of one row of nodes, each one node longer than the previous one. None packs a
                separate prompt for each output.

        Returns:
            The packed tokens. Row c of the soft tokens is the graph of output c, row C + m is node m of `nodes`.

        Raises:
            ValueError: Passes were given, but the first placeholder of the template is not {nodes}.
        """
        if pass_offsets_P1 is None:
            count = nodes.num_rows
            return PackedPrompts.separate(self.prefix_P, self._lay_out(self.segments, count, count, nodes, text))
        if not self.supports_one_pass:
            raise ValueError("encoding prefixes in one pass requires {nodes} as the first placeholder of the template")
        count = nodes.values.numel()
        contexts = self._lay_out(["nodes"], nodes.num_rows, count, nodes, text)
        suffixes = self._lay_out(self.segments[1:], count, count, nodes, text)
        return PackedPrompts.in_one_pass(self.prefix_P, contexts, suffixes)

    def _lay_out(self, segments: list[str], rows: int, num_outputs: int, nodes: Jagged, text: Jagged) -> Jagged:
        """Tokens of the segments, one row per prompt: a token id, or -1 - s for row s of the soft tokens."""
        device = nodes.offsets.device
        parts = [Jagged(text.values[:0], torch.zeros(rows + 1, dtype=torch.int64, device=device))]
        for segment in segments:
            if segment == "nodes":
                soft_rows = torch.arange(nodes.values.numel(), device=device) + num_outputs
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
        return Jagged.concatenate(parts)


class PromptSet(nn.ModuleDict):
    """The compiled prompt of each task in one module, at which TorchRec's tracing stops."""

    def __init__(self, prompts: Mapping[Task, CompiledPrompt]) -> None:
        super().__init__({str(task): prompt for task, prompt in prompts.items()})

    def forward(self, task: Task, nodes: Jagged, text: Jagged, pass_offsets_P1: Tensor | None = None) -> PackedPrompts:
        """Packs the prompts of a batch, see `CompiledPrompt.forward`."""
        packed: PackedPrompts = self[task](nodes, text, pass_offsets_P1)
        return packed


def compile_prompt(
    template: PromptTemplate, tokenizer: "PreTrainedTokenizerBase", with_text: bool = True
) -> CompiledPrompt:
    """Tokenizes a template.

    The prompt starts with the special tokens that the tokenizer puts before a text (LLaMA's <s>). Each constant is
    tokenized separately, so that no batch needs a tokenizer.

    Args:
        template: The template.
        tokenizer: The language model's tokenizer.
        with_text: Whether the prompt includes the placeholder {text}.
    """
    parts = list(template.segments(with_text))
    prefix = _leading_special_tokens(tokenizer) + _tokens(parts[0], tokenizer)
    segments: list[list[int] | str] = []
    for placeholder, constant in zip(parts[1::2], parts[2::2], strict=True):
        segments.append(placeholder)
        if ids := _tokens(constant, tokenizer):
            segments.append(ids)
    return CompiledPrompt(prefix, segments)


def prompt_nodes(graph: SessionGraph, order: NodeOrder, max_nodes: int) -> Jagged:
    """Nodes of each session's prompt.

    Args:
        graph: The sessions' graphs.
        order: Clicks in order with repeats, or each distinct item once in order of its last click.
        max_nodes: Number of newest nodes per session; 0 includes all.

    Returns:
        Node index in the batch, int64, oldest first, one row per session.
    """
    click_L = torch.arange(graph.alias_L.numel(), device=graph.alias_L.device)
    session_L = graph.click_session_L
    included_L = torch.ones_like(click_L, dtype=torch.bool)
    if order == "unique":
        last_click_N = torch.zeros_like(graph.node_items_N)
        # Clicks are in order of time, so the largest click number of a node is its last click.
        last_click_N.scatter_reduce_(0, graph.alias_L, click_L, "amax", include_self=False)
        included_L = last_click_N[graph.alias_L] == click_L
    if max_nodes:
        included_before_L1 = torch.cat([included_L.new_zeros(1, dtype=torch.int64), included_L.cumsum(0)])
        newer_L = included_before_L1[graph.click_offsets_B1[1:]][session_L] - included_before_L1[1:]
        included_L = included_L & (newer_L < max_nodes)
    lengths_B = torch.zeros_like(graph.click_offsets_B1[1:]).index_add_(0, session_L, included_L.to(torch.int64))
    return Jagged.from_lengths(graph.alias_L[included_L], lengths_B)


def one_pass_nodes(graph: SessionGraph, pass_offsets_P1: Tensor) -> Jagged:
    """Nodes of the prompt of each pass: the last n clicks of its longest prefix, for a pass of n prefixes.

    Args:
        graph: Graphs of the prefixes.
        pass_offsets_P1: First prefix of each pass, int64; each prefix is one click longer than the previous one.

    Returns:
        Node index in the batch of each click, int64, from the longest prefix's graph, one row per pass.
    """
    lengths_P = pass_offsets_P1[1:] - pass_offsets_P1[:-1]
    ends_P = graph.click_offsets_B1[pass_offsets_P1[1:]]
    clicks = Jagged(graph.alias_L, graph.click_offsets_B1)
    return clicks.gather(ends_P - lengths_P, lengths_P, total=graph.num_sessions)


def _tokens(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _leading_special_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Special tokens that the tokenizer puts before every text, found by encoding one."""
    with_special, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for count in range(len(with_special) - len(plain) + 1):
        if with_special[count : count + len(plain)] == plain:
            return with_special[:count]
    return []

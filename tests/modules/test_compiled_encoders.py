"""Session encoders under autocast, `torch.compile`, `torch.export` and AOTInductor, against eager mode."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch._dynamo.config
import torch._inductor
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.modules.dynamic_export import export_dynamic
from llmgr_rec.modules.encoders import ENCODERS, build_encoder
from tests.modules.graphs import graphs_of

DIM = 8
# Few clicks, so that some are too old, and compilers have little to unroll.
VARIANTS = {
    **{name: EncoderConfig(name=name, dropout=0.0, max_clicks=4) for name in ENCODERS},
    "gcsan, 2 blocks": EncoderConfig(name="gcsan", dropout=0.0, attention_layers=2, attention_heads=2),
    "sasrec, 2 heads": EncoderConfig(name="sasrec", dropout=0.0, attention_heads=2, attention_layers=2),
}
Sessions = Sequence[Sequence[int]]
SESSIONS: Sessions = [[1, 2, 3, 2, 4], [5], [], [3, 3, 1, 3, 3], [0, 7, 0, 7, 0, 8]]
# One session, one click, no clicks, no sessions; and many.
OTHERS: Sequence[Sessions] = [[[1, 2, 1]], [[6]], [[]], [[], []], [[], [4, 4], []], [], [[*range(9)] * 2] * 7]

all_encoders = pytest.mark.parametrize("name", VARIANTS)


def all_but_one_slow(quick: str) -> pytest.MarkDecorator:
    """All encoders; by default only the one named, because tracing takes seconds."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name != quick]
    return pytest.mark.parametrize("name", [quick, *slow])


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler, g++")


class OfTensors(nn.Module):
    """An encoder whose inputs and outputs are tensors."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = build_encoder(VARIANTS[name], DIM).eval()

    def forward(self, nodes_ND: Tensor, *graph: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.encoder(nodes_ND, SessionGraph(*graph))
        return encoded.states_ND, encoded.sessions_BD


def inputs_of(sessions: Sessions) -> tuple[Tensor, ...]:
    graph = graphs_of(sessions)
    table = torch.randn(16, DIM, generator=torch.Generator().manual_seed(1))
    return (table[graph.node_items_N], *graph.tensors())


def exported(encoder: OfTensors) -> ExportedProgram:
    nodes, sessions, clicks, edges = (Dim(size) for size in "NBLE")
    graph = (nodes, sessions + 1, sessions + 1, clicks, edges, edges, edges)
    return export_dynamic(encoder, inputs_of(SESSIONS), ({0: nodes}, tuple({0: size} for size in graph)))


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Blocks after the first read the number of nodes of the longest session, which Dynamo leaves out by default."""
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield
    torch._dynamo.reset()


@all_encoders
def test_autocast_to_bfloat16_is_close_and_trains(name: str) -> None:
    encoder = OfTensors(name)
    results = []
    for enabled in (True, False):
        encoder.zero_grad()
        nodes_ND, *graph = inputs_of(SESSIONS)
        nodes_ND.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            states_ND, sessions_BD = encoder(nodes_ND, *graph)
        (states_ND.float().sin().sum() + sessions_BD.float().sin().sum()).backward()
        gradients = [nodes_ND.grad, *(parameter.grad for parameter in encoder.parameters())]
        assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
        results.append([states_ND.float(), sessions_BD.float(), *gradients])
    torch.testing.assert_close(results[0], results[1], rtol=0.05, atol=0.05)


@all_encoders
def test_autocast_of_sessions_without_clicks_is_finite(name: str) -> None:
    encoder = OfTensors(name)
    with torch.autocast("cpu", torch.bfloat16):
        sessions_BD = encoder(*inputs_of([[], [1, 2], []]))[1]
    assert (sessions_BD[[0, 2]] == 0).all()
    sessions_BD.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters() if parameter.grad is not None)


@all_but_one_slow("gcsan")
def test_compiles_without_graph_breaks(name: str, dynamo: None) -> None:
    encoder = OfTensors(name)
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend="eager")
    for sessions in (SESSIONS, OTHERS[-1]):
        torch.testing.assert_close(compiled(*inputs_of(sessions)), encoder(*inputs_of(sessions)))


@all_but_one_slow("sasrec, 2 heads")
def test_exports_with_any_number_of_sessions_and_clicks(name: str) -> None:
    encoder = OfTensors(name)
    program = exported(encoder).module()
    for sessions in (SESSIONS, *OTHERS):
        torch.testing.assert_close(program(*inputs_of(sessions)), encoder(*inputs_of(sessions)))


@pytest.mark.slow
@needs_compiler
@all_encoders
def test_trains_compiled_by_inductor(name: str, dynamo: None) -> None:
    encoder = OfTensors(name)
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True)
    for sessions in (SESSIONS, *OTHERS):
        results = []
        for forward in (compiled, encoder):
            encoder.zero_grad()
            nodes_ND, *graph = inputs_of(sessions)
            nodes_ND.requires_grad_()
            states_ND, sessions_BD = forward(nodes_ND, *graph)
            (states_ND.sin().sum() + sessions_BD.sin().sum()).backward()
            gradients = [nodes_ND.grad, *(parameter.grad for parameter in encoder.parameters())]
            results.append([states_ND, sessions_BD, *gradients])
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@needs_compiler
@all_encoders
def test_runs_as_a_package_of_aotinductor(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if name == "gcsan, 2 blocks":
        request.applymarker(pytest.mark.xfail(reason="torch 2.13 writes C++ that names an unknown size", strict=True))
    encoder = OfTensors(name)
    package = torch._inductor.aoti_compile_and_package(exported(encoder), package_path=str(tmp_path / "encoder.pt2"))
    program = torch._inductor.aoti_load_package(package)
    for sessions in (SESSIONS, *OTHERS):
        expected = encoder(*inputs_of(sessions))
        torch.testing.assert_close(tuple(program(*inputs_of(sessions))), expected, rtol=1e-4, atol=1e-5)

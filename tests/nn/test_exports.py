"""Compressed and pruned networks are ordinary ones: copied, compiled, exported, and run by others."""

import copy
import functools
import io

import numpy as np
import pytest
import torch
from small import Net, network
from torch import nn
from torch.export import Dim

import pysolve as ps
from pysolve.errors import CollapseError, PysolveError
from pysolve.forms import LowRank
from pysolve.nn.cut.apply import apply
from pysolve.nn.layers.attention import opened
from pysolve.nn.layers.factored import Factored
from pysolve.nn.layers.runtime import to_dense
from pysolve.nn.layers.sparse import SparseConv2d, SparseLinear
from pysolve.plan import Collapse, Plan, Site

NAMES = ("residual", "grouped", "two_residuals", "transformer_layer")
ALL = [("residual", "compressed"), ("grouped", "pruned"), *((name, "both") for name in NAMES)]
# One of each kind of export is quick.
FEW = [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]
FREE_BATCH = ({0: Dim.DYNAMIC},)
every_network = pytest.mark.parametrize(("name", "kind"), ALL)
# What torch says of itself while torch.onnx copies an exported program.
onnx_warnings = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")


def sparse_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, SparseLinear | SparseConv2d)]


@pytest.fixture(scope="module", autouse=True)
def _one_table():
    """torch.onnx reads its table of operators once, which takes a third of the export of a small network."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        table = functools.cache(ONNXRegistry.from_torchlib)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(table))
        yield


@functools.cache
def _made(name, kind):
    model, batch = network(name)
    if kind != "pruned":
        model = ps.compress(model, [samples(batch, 8, seed) for seed in range(3)], keep=0.5, progress=False)
    if kind != "compressed":
        model = ps.prune(model, amount=0.5, layout="sparse")
    return model.model, batch


def made(name, kind):
    """A network compressed to about half, pruned to sparse layers, or one after the other; and a batch."""
    return copy.deepcopy(_made(name, kind))


def samples(batch, n, seed=0):
    return torch.randn(n, *batch.shape[1:], generator=torch.Generator().manual_seed(seed))


@every_network
def test_a_copy_computes_the_same_and_shares_no_memory(name, kind):
    model, batch = made(name, kind)
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(batch)
        assert torch.equal(other(batch), expected)
        for tensor in model.state_dict().values():
            tensor.zero_()
        assert torch.equal(other(batch), expected)


@every_network
def test_a_plain_state_dict_loads_into_a_copy(name, kind):
    model, batch = made(name, kind)
    expected = model(batch)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    assert not torch.allclose(other(batch), expected)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(batch), expected)


@every_network
def test_an_exported_program_computes_the_same_for_any_batch_by_torch_s_operators_alone(name, kind):
    model, batch = made(name, kind)
    program = torch.export.export(model, (batch,), dynamic_shapes=FREE_BATCH)
    assert operators(program) == {"aten"}
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for n in (2, 5):
        x = samples(batch, n)
        torch.testing.assert_close(program.module()(x), model(x))
        torch.testing.assert_close(loaded.module()(x), model(x))


def operators(program):
    """The libraries whose operators a program calls."""
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_the_values_as_they_are_and_can_be_trained(strict):
    model, batch = made("two_residuals", "both")
    model(batch)
    for layer in sparse_layers(model):
        layer.values = nn.Parameter(layer.values.detach() * 2)
    module = torch.export.export(copy.deepcopy(model), (batch,), strict=strict).module()
    outputs = [net(batch) for net in (module, model)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    theirs = dict(module.named_parameters())
    for name, own in model.named_parameters():
        torch.testing.assert_close(theirs[name].grad, own.grad)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
def test_a_jit_trace_follows_sparse_layers():
    model, batch = made("residual", "pruned")
    trace = torch.jit.trace(model, (batch,))
    torch.testing.assert_close(trace(2 * batch), model(2 * batch))


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# torch hides this one from users, but cannot where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", FEW)
def test_a_compiled_network_computes_the_same_and_has_the_same_gradients(name, monkeypatch):
    model, batch = made(name, "both")
    x, y = batch.clone().requires_grad_(), batch.clone().requires_grad_()
    expected = model(x)
    expected.square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    runs = counted(monkeypatch)
    output = torch.compile(model, backend="eager")(y)
    assert len(runs) == len(sparse_layers(model)) > 0
    output.square().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(y.grad, x.grad)
    for parameter, own in model.named_parameters():
        torch.testing.assert_close(own.grad, wanted[parameter])


def counted(monkeypatch):
    """A list that grows with every sparse product."""
    runs = []
    product = ps.SparseMatrix.matmul

    def noted(matrix, *args, **kwargs):
        runs.append(torch.compiler.is_compiling())
        return product(matrix, *args, **kwargs)

    monkeypatch.setattr(ps.SparseMatrix, "matmul", noted)
    return runs


@pytest.mark.usefixtures("fresh_compiler")
def test_what_surrounds_a_sparse_layer_is_compiled():
    model = Net(lambda net, x: nn.functional.gelu(net.a(x)) * x, a=nn.Linear(6, 6))
    model, batch = ps.prune(model, amount=0.5, layout="sparse").model, torch.randn(3, 6)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(batch), model(batch))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@onnx_warnings
@pytest.mark.parametrize("name", FEW)
def test_an_onnx_model_computes_the_same_for_any_batch(name):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, batch = made(name, "both")
    proto = exported(model, batch)
    onnx.checker.check_model(proto, full_check=True)
    session = runtime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for n in (2, 5):
        x = samples(batch, n)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        expected = model(x).detach()
        scale = float(expected.abs().max())
        torch.testing.assert_close(torch.from_numpy(y), expected, atol=1e-5 * scale, rtol=0)


@onnx_warnings
def test_an_onnx_model_holds_entries_alone_or_one_tensor_a_weight_once_the_network_is_dense():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 150), nn.ReLU(), nn.Linear(150, 150)).eval()
    model, batch = ps.prune(model, amount=0.95, layout="sparse").model, torch.randn(2, 150)
    sparse, dense = exported(model, batch), exported(to_dense(model), batch)
    assert [node.op_type for node in dense.graph.node] == ["Gemm", "Relu", "Gemm"]
    state = to_dense(model).state_dict()
    assert {x.name: [*x.dims] for x in dense.graph.initializer} == {k: [*v.shape] for k, v in state.items()}
    assert len(sparse.SerializeToString()) < len(dense.SerializeToString()) / 2


def exported(model, batch):
    return torch.onnx.export(
        model, (batch,), dynamo=True, dynamic_shapes=FREE_BATCH, verbose=False
    ).model_proto


@every_network
def test_a_network_made_dense_computes_the_same(name, kind):
    model, batch = made(name, kind)
    dense = to_dense(model)
    torch.testing.assert_close(dense(batch), model(batch))
    assert not sparse_layers(dense)
    assert bool(sparse_layers(model)) == (kind != "compressed")


def test_a_layer_under_two_names_stays_one_when_made_dense():
    layer = SparseLinear.from_dense(nn.Linear(6, 6))
    dense = to_dense(nn.Sequential(layer, nn.ReLU(), layer))
    assert type(dense[0]) is nn.Linear
    assert dense[0] is dense[2]
    assert type(to_dense(layer)) is nn.Linear


PINNED = {
    # Network, the layers that stay dense, and what is said of the first site of each.
    ("two_residuals", ("stem", "fc")): {"stem": "`a1`, a SparseLinear, works on them as a whole"},
    ("residual", ("conv1", "fc")): {"conv1": "`conv2`, a SparseConv2d, works on them as a whole"},
    ("residual", ("conv2",)): {"conv2": "the result of conv2d meets these channels directly"},
    ("transformer_layer", ("linear1",)): {"linear1": "`linear2`, a SparseLinear, works on them as a whole"},
    ("grouped", ("0",)): {"0": "`2`, a SparseConv2d, works on them as a whole"},
}


@pytest.mark.parametrize(("name", "ignore"), PINNED)
def test_channels_that_meet_a_sparse_layer_stay_and_the_reason_says_so(name, ignore):
    model, batch = network(name)
    pruned = ps.prune(model, amount=0.5, layout="sparse", ignore=ignore).model
    reasons = {writer: site.pinned for site in ps.find_sites(pruned, batch) for writer in site.writers}
    assert None not in reasons.values()
    assert not any("layers.py" in reason or "products.py" in reason for reason in reasons.values())
    for writer, reason in PINNED[name, ignore].items():
        assert reasons[writer].startswith(reason)
    with pytest.raises(PysolveError, match=r"no channel .* can be removed"):
        ps.compress(pruned, [batch], progress=False)


def test_layers_apart_from_sparse_ones_can_be_compressed():
    torch.manual_seed(0)
    layers = nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU()
    model = nn.Sequential(*layers, nn.Linear(8, 3)).eval()
    pruned = ps.prune(model, amount=0.3, layout="sparse", ignore=["0", "2"])
    assert len(sparse_layers(pruned.model)) == 2
    free = [site.name for site in ps.find_sites(pruned.model, torch.randn(2, 5)) if site.pinned is None]
    assert free == ["0 → 2"]
    batches = [torch.randn(64, 5) for _ in range(4)]
    smaller = ps.compress(pruned, batches, keep=8, progress=False)
    assert smaller.model[0].out_features == smaller.model[2].in_features == 8
    before, after = (net.state_dict() for net in (pruned.model, smaller.model))
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith(("4.", "6.")))
    error = nn.functional.mse_loss(smaller.model(batches[0]), pruned.model(batches[0]))
    assert error < 0.1 * pruned.model(batches[0]).var()


@pytest.mark.parametrize("role", ["writers", "readers"])
def test_a_site_written_by_hand_cannot_cut_a_sparse_layer(role):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    pruned = ps.prune(model, amount=0.5, layout="sparse", ignore=["0" if role == "readers" else "2"]).model
    plan = Plan((Collapse(Site(6, ("0",), ("2",)), [0, 2]),))
    with pytest.raises(CollapseError, match="SparseLinear"):
        apply(pruned, plan)


# --- factored networks


@functools.cache
def _factored(name, pruned):
    model, batch = network(name)
    data = [samples(batch, 24, seed) for seed in range(2)]
    result = ps.low_rank(model, data, rank=1, layout="factored", progress=False)
    if pruned:
        result = ps.prune(result, amount=0.5, layout="sparse")
    return result.model, batch


def factored(name, pruned=False):
    """A network most of whose layers became two, and a batch."""
    return copy.deepcopy(_factored(name, pruned))


every_factored = pytest.mark.parametrize(
    ("name", "pruned"),
    [("residual", False), ("transformer_layer", False), ("conv1d", False), ("residual", True)],
)


@every_factored
def test_factored_networks_are_copied_and_take_plain_state_dicts(name, pruned):
    model, batch = factored(name, pruned)
    assert any(isinstance(layer, Factored) for layer in model.modules())
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(batch)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        for tensor in model.state_dict().values():
            tensor.zero_()
        assert torch.equal(other(batch), expected)
        buffer.seek(0)
        model.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(model(batch), expected)


@every_factored
def test_factored_networks_are_exported_for_any_batch_by_torch_s_operators_alone(name, pruned):
    model, batch = factored(name, pruned)
    program = torch.export.export(model, (batch,), dynamic_shapes=FREE_BATCH)
    assert operators(program) == {"aten"}
    for n in (2, 5):
        x = samples(batch, n)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_factored_networks_are_compiled_as_a_whole_and_train():
    model, batch = factored("residual")
    expected = model(batch)
    expected.square().sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    output = torch.compile(model, backend="aot_eager", fullgraph=True)(batch)
    output.square().sum().backward()
    torch.testing.assert_close(output, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])


@every_factored
def test_factored_networks_become_dense_and_compute_the_same(name, pruned):
    model, batch = factored(name, pruned)
    dense = to_dense(model)
    assert not any(isinstance(layer, Factored | SparseConv2d | SparseLinear) for layer in dense.modules())
    original = opened(network(name)[0])
    assert [*dense.state_dict()] == [*original.state_dict()]
    torch.testing.assert_close(dense(batch), model(batch), atol=1e-4, rtol=1e-4)


@onnx_warnings
def test_an_onnx_model_of_a_factored_network_computes_the_same():
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, batch = factored("residual")
    session = runtime.InferenceSession(
        exported(model, batch).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = samples(batch, 5)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), atol=1e-5, rtol=1e-4)


@onnx_warnings
@pytest.mark.parametrize("apart", [0, 4])
def test_an_onnx_model_of_a_factored_embedding_and_its_head_computes_the_same(apart):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, rng = nn.Sequential(nn.Embedding(11, 6), nn.Tanh(), nn.Linear(6, 11)), np.random.default_rng(0)
    model[2].weight = model[0].weight
    rows, exact = np.arange(3, 3 + apart), rng.standard_normal((apart, 6))
    parts = rng.standard_normal((11 - apart, 2)), rng.standard_normal((2, 6))
    form = LowRank(*parts, rows, exact) if apart else LowRank(*parts)
    smaller = apply(model.eval(), Plan(forms={"0.weight": form}))
    ids = torch.arange(11).repeat(2, 1)
    session = runtime.InferenceSession(
        exported(smaller, ids).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {session.get_inputs()[0].name: ids.repeat(3, 1).numpy()})
    torch.testing.assert_close(torch.from_numpy(y), smaller(ids.repeat(3, 1)).detach(), atol=1e-5, rtol=1e-4)


def test_channels_of_factored_layers_can_go():
    model, batch = factored("residual")
    free = [site for site in ps.find_sites(model, batch) if site.pinned is None]
    writers = {writer for site in free for writer in site.writers}
    assert any(writer.endswith(".outer") for writer in writers)

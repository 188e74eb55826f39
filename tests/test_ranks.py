"""Engines with real processes: training on several ranks equals training on one."""

import importlib
import math
import time
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from ranks import LIMIT, Ranks, spawn
from support import ALL_PATHS, METHODS, OF_SIBLINGS, PathOptions, in_turn, param
from torch import distributed as dist
from torch.optim import SGD, AdamW, Optimizer

from cwd_wrap import CautiousDecay, MaskMonitor, PNormDecay

if not dist.is_available() or not hasattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard"):
    pytest.skip("this torch has no fully_shard", allow_module_level=True)


ENGINES: dict[str, tuple[int, Any, Any]] = {
    "DDP": (2, engines.ddp, engines.net),
    "FSDP2": (2, engines.fsdp2, engines.net),
    "FSDP2 over three": (3, engines.fsdp2, engines.net),
    "FSDP2, Shard(1)": (2, engines.columns, engines.block),
    "FSDP2, CPU offload": (2, engines.offloaded, engines.net),
    "FSDP2, mixed": (2, engines.mixed, engines.net),
    "HSDP": (4, engines.hsdp, engines.net),
    "sequence parallel": (2, engines.sequence_parallel, engines.block),
    "FSDP2 x TP": (4, engines.fsdp2_and_tp, engines.block),
}
# FSDP2 and sequence parallelism, which has partial gradients, on each path; each other engine on one.
EVERYWHERE = in_turn(["FSDP2", *(name for name in ENGINES if name not in ("FSDP2", "sequence parallel"))])
every_engine = pytest.mark.parametrize(("engine", "path"), [*EVERYWHERE, *in_turn(["sequence parallel"])])
SIBLINGS = in_turn(("update", "update-numel", "p-norm", "p-norm-2"), OF_SIBLINGS)


def adamw(parameters: Any, path: PathOptions, name: str = "decay") -> Any:
    """A method around AdamW, with one group for each kind of tensor: fused AdamW takes no mixed groups."""
    cls, _, options = METHODS[name]
    parameters = list(parameters)
    kinds = {type(p.data) for p in parameters}
    groups = [{"params": [p for p in parameters if type(p.data) is kind]} for kind in kinds]
    return cls(AdamW(groups, lr=0.01, weight_decay=0.5, **path.base), **options, **path)


@cache
def run(engine: str, path: str, name: str = "decay") -> Any:
    """The result of one rank, after a check that all ranks returned the same."""
    ranks, start, _ = ENGINES[engine]
    chosen = next(each for each in ALL_PATHS if str(each) == path)
    results = spawn(ranks, engines.trained, start, partial(adamw, path=chosen, name=name), 16)
    for weights, _, _ in results:
        assert (weights == results[0][0]).all()
    return results[0]


@every_engine
def test_training_is_that_of_one_process(engine: str, path: PathOptions) -> None:
    """Training on several ranks gives the weights of one process to 1e-15; the same gradients give the same bits."""
    expected = engines.alone(ENGINES[engine][2](), partial(adamw, path=path))  # first: ranks find compiled kernels
    weights, gradients, kind = run(engine, str(path))
    replayed = engines.replayed(ENGINES[engine][2](), partial(adamw, path=path), gradients)

    assert "CautiousDecay" == kind
    torch.testing.assert_close(torch.from_numpy(weights), expected, rtol=0, atol=1e-15)
    assert torch.equal(torch.from_numpy(weights), replayed)


@pytest.mark.parametrize(("name", "path"), SIBLINGS)
@pytest.mark.parametrize("engine", ["FSDP2 over three", "HSDP"])
def test_siblings_count_over_whole_tensors(engine: str, name: str, path: PathOptions) -> None:
    """CautiousUpdate's scale and PNormDecay's zeros cover the whole tensor, with the bits of one process."""
    engines.alone(engines.net(), partial(adamw, path=path, name=name))  # so that ranks find compiled kernels
    weights, gradients, _ = run(engine, str(path), name)
    expected = engines.replayed(ENGINES[engine][2](), partial(adamw, path=path, name=name), gradients)

    assert torch.equal(torch.from_numpy(weights), expected)


def zeroed(rank: int) -> list[float]:
    """Step a layer that is zero on one rank only, and a layer that is zero everywhere."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    values = ([1.0, 1.0, 0.0, 0.0], [0.0] * 4)
    parameters = [torch.nn.Parameter(distribute_tensor(torch.tensor(v), mesh, [Shard(0)])) for v in values]
    for p in parameters:
        p.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    opt = PNormDecay(SGD(parameters, lr=0.1, weight_decay=0.5), p=1.0)
    opt.step()
    opt.zero_grad()
    return [*parameters[0].full_tensor().tolist(), *parameters[1].full_tensor().tolist(), *opt.sparsity()]


def test_zero_as_a_whole_is_that_of_the_whole_tensor() -> None:
    """A shard of zeros stays zero where another rank has a weight; a tensor of zeros on all ranks trains."""
    for result in spawn(2, zeroed):
        torch.testing.assert_close(result, [0.9 / 1.05, 0.9 / 1.05, 0.0, 0.0, *[-0.1] * 4, 0.25])


# ---- what is communicated


def collectives(rank: int, make: Any, build: Any) -> list[int]:
    """The number of collectives in each of several steps."""
    from torch.distributed.tensor.debug import CommDebugMode

    model, parts = make()
    optimizer = build(model.parameters())
    counts = []
    for step in range(engines.STEPS):
        optimizer.zero_grad()
        engines.loss_of(model, engines.part_of(engines.batch(model, step), parts)).backward()
        with CommDebugMode() as counted:
            optimizer.step()
        counts.append(int(counted.get_total_counts()))
    return counts


def plain(parameters: Any, base: Any) -> Any:
    return base(parameters, weight_decay=0.5)


def wrapped(parameters: Any, base: Any, name: str, **options: Any) -> Any:
    cls, _, own = METHODS[name]
    return cls(base(parameters, weight_decay=0.5), **own, **options)


SGDM, FUSED = partial(SGD, lr=0.1, momentum=0.9), partial(AdamW, lr=0.01, fused=True)


@pytest.mark.parametrize("base", [AdamW, SGDM, FUSED], ids=["AdamW", "SGD", "AdamW-fused"])
@pytest.mark.parametrize("make", [engines.fsdp2, engines.sequence_parallel], ids=["FSDP2", "sequence parallel"])
def test_decay_adds_no_collective(make: Any, base: Any) -> None:
    """CautiousDecay adds no collective to those of the base, with partial gradients or without."""
    alone = spawn(2, collectives, make, partial(plain, base=base))
    ours = spawn(2, collectives, make, partial(wrapped, base=base, name="decay"))

    for rank in range(2):
        assert all(own <= others for own, others in zip(ours[rank], alone[rank], strict=True))


def test_forcing_the_direction_reads_partial_gradients() -> None:
    """path="direction" needs the sum of a partial gradient and communicates for it, as documented."""
    counts = [
        spawn(2, collectives, engines.sequence_parallel, partial(wrapped, base=SGDM, name="decay", path=path))[0]
        for path in ("pieces", "direction")
    ]

    assert sum(counts[0]) < sum(counts[1])


@pytest.mark.parametrize("name", ["update", "p-norm"])
@pytest.mark.parametrize(("ranks", "make"), [(2, engines.fsdp2), (4, engines.hsdp)], ids=["FSDP2", "HSDP"])
def test_siblings_make_one_collective(ranks: int, make: Any, name: str) -> None:
    """The counts of all parameters share one all-reduce."""
    assert [[1] * engines.STEPS] * ranks == spawn(ranks, collectives, make, partial(wrapped, base=AdamW, name=name))


def step_along_unfinished_gradient(rank: int, backend: str) -> list[float]:
    """Step along a gradient that a collective may still be writing; return its type and the weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    p = torch.nn.Parameter(distribute_tensor(torch.tensor([1.0, 1.0, -1.0, -1.0]), mesh, [Shard(0)]))
    everywhere = p.redistribute(placements=[Replicate()], async_op=True).to_local(grad_placements=[Partial()])
    (everywhere * torch.tensor([0.5, -0.5, 0.5, -0.5])).sum().backward()
    kind = type(p.grad.to_local()).__name__
    CautiousDecay(SGD([p], lr=0.1), lam=0.5, backend=backend).step()
    return [kind, *p.full_tensor().tolist()]


@pytest.mark.parametrize("backend", [param(b, path={"backend": b}) for b in ("eager", "numba")])
def test_an_unfinished_gradient_is_waited_for(backend: str) -> None:
    """An AsyncCollectiveTensor has no address yet; kernels that follow addresses get the tensor in it."""
    for kind, *weights in spawn(2, step_along_unfinished_gradient, backend):
        assert "AsyncCollectiveTensor" == kind
        torch.testing.assert_close(weights, [0.85, 1.1, -1.1, -0.85])


class SkipsOutliers(Optimizer):
    """SGD that takes no step along gradients above 10. No table knows it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.5})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not (p.grad.abs() > 10).any():
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * p.grad)


def step_of_one_rank(rank: int, name: str, gradient: list[float]) -> list[float]:
    """Four weights of 1 on two ranks, after a step along ``gradient``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (2,))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.tensor(gradient), mesh, [Shard(0)])
    cls, _, options = METHODS[name]
    cls(SkipsOutliers([p]), **options).step()
    return p.full_tensor().tolist()


@pytest.mark.parametrize(("name", "moved", "stayed"), [("decay", 0.85, 0.95), ("p-norm-2", 0.9 / 1.1, 1 / 1.1)])
def test_a_shard_that_did_not_move_is_no_skipped_step(name: str, moved: float, stayed: float) -> None:
    """A shard whose steps are lost in rounding decays if that of the other rank moved. No rank waits for another."""
    for weights in spawn(2, step_of_one_rank, name, [1.0, 1.0, 1e-9, 1e-9]):
        assert pytest.approx([moved, moved, stayed, stayed]) == weights
    for weights in spawn(2, step_of_one_rank, name, [99.0] * 4):
        assert [1.0] * 4 == weights


# ---- flat pieces


def fully_sharded(rank: int, views: bool, name: str, **options: Any) -> Any:
    """Train under FSDP1; return the error's text, or "", and the weights at the end or at the error."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(engines.net(), use_orig_params=views, device_id=torch.device("cpu"))
    cls, _, own = METHODS[name]
    text = ""
    try:
        optimizer = cls(AdamW(model.parameters(), lr=0.01, weight_decay=0.5), **own, **options)
        for step in range(engines.STEPS):
            optimizer.zero_grad()
            x = engines.part_of(engines.batch(engines.net(), step), 2)
            (model(x) - x.square().sum(-1, keepdim=True)).square().mean().backward()
            optimizer.step()
    except ValueError as error:
        text = str(error)
    with FullyShardedDataParallel.summon_full_params(model):
        return text, engines.flat(p for p in model.parameters()).numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("views", [False, True], ids=["flat", "use_orig_params"])
def test_decay_under_fsdp1(views: bool) -> None:
    """FSDP1's flat shards decay like the weights in them."""
    expected = engines.alone(engines.net(), partial(wrapped, base=partial(AdamW, lr=0.01), name="decay"))
    for text, weights in spawn(2, fully_sharded, views, "decay"):
        assert not text
        torch.testing.assert_close(torch.from_numpy(weights), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("views", [False, True], ids=["flat", "use_orig_params"])
@pytest.mark.parametrize(
    ("name", "way_out"), [("update", "pass scale=None"), ("p-norm", "use CautiousDecay"), ("random", "another mask")]
)
def test_numbers_over_tensors_are_refused_under_fsdp1(name: str, way_out: str, views: bool) -> None:
    """Methods that count over whole tensors raise under FSDP1, which hides the shapes from the optimizer."""
    for text, weights in spawn(2, fully_sharded, views, name):
        assert "needs a count over each whole tensor, but param group 0 of AdamW has flat pieces of tensors" in text
        assert way_out in text and "fully_shard" in text
        assert torch.equal(engines.flat(engines.net().parameters()), torch.from_numpy(weights))


def replaced(flat: bool) -> tuple[Any, ...]:
    """A wrapper in which an engine has replaced the parameters by master weights: one flat tensor, or one for each."""
    model = engines.net()
    opt = METHODS["update"][0](AdamW(model.parameters(), lr=0.01, weight_decay=0.5))
    masters = [p.detach().clone() for p in model.parameters()]
    masters = [torch.cat([each.flatten() for each in masters])] if flat else masters
    opt.param_groups[0]["params"] = masters
    for each in masters:
        each.requires_grad_().grad = torch.ones_like(each)
    return opt, masters


def test_flat_master_weights_are_refused() -> None:
    """A method that counts over tensors refuses flat master weights (DeepSpeed's ZeRO), and nothing changes."""
    opt, (master,) = replaced(flat=True)
    before = master.detach().clone()

    with pytest.raises(
        ValueError, match=r"flat pieces of tensors, such as one of shape \(26,\), as FSDP1, DeepSpeed and Megatron"
    ):
        opt.step()
    assert torch.equal(before, master)


def test_master_weights_of_the_same_shapes_are_accepted() -> None:
    """Master weights in the parameters' shapes are accepted, vectors included."""
    opt, masters = replaced(flat=False)
    before = [master.detach().clone() for master in masters]
    opt.step()

    assert not any(torch.equal(old, new) for old, new in zip(before, masters, strict=True))


# ---- ZeroRedundancyOptimizer


def zero(rank: int, around: bool, path: PathOptions, piece: int) -> Any:
    """Train under DDP with the wrapper in a ZeroRedundancyOptimizer, or around it."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options = {"lr": 0.01, "weight_decay": 0.5, **path.base}

    def build(parameters: Any) -> Any:
        if around:
            return CautiousDecay(ZeroRedundancyOptimizer(parameters, optimizer_class=AdamW, **options))
        return ZeroRedundancyOptimizer(parameters, optimizer_class=CautiousDecay.over(AdamW, **path), **options)

    return engines.trained(rank, engines.ddp, build, piece)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", [param(path, path=path) for path in ALL_PATHS])
def test_the_wrapper_in_zero(path: PathOptions) -> None:
    """Inside ZeroRedundancyOptimizer both ranks get the bits of one process."""
    for weights, gradients, _ in spawn(2, zero, False, path, 16):
        assert torch.equal(
            torch.from_numpy(weights), engines.replayed(engines.net(), partial(adamw, path=path), gradients)
        )


@pytest.mark.filterwarnings("ignore")
def test_the_wrapper_around_zero() -> None:
    """Around ZeroRedundancyOptimizer both ranks get the bits of the snapshot path."""
    path = PathOptions(path="snapshot")
    for weights, gradients, kind in spawn(2, zero, True, path, 16):
        assert torch.equal(
            torch.from_numpy(weights), engines.replayed(engines.net(), partial(adamw, path=path), gradients)
        )
        assert "CautiousDecay" == kind


# ---- distributed checkpoints


def made(parameters: Any, wrap: bool, lr: Any = 0.01) -> Any:
    base = AdamW(parameters, lr=lr, weight_decay=0.5)
    return CautiousDecay(base) if wrap else base


def states(model: Any, optimizer: Any, flatten: bool) -> tuple[dict[str, Any], Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    weights, state = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": state}, options


def saved(rank: int, folder: str, wrap: bool, flatten: bool) -> None:
    """Take two steps under FSDP2 and save a checkpoint."""
    from torch.distributed import checkpoint

    model, parts = engines.fsdp2()
    optimizer = made(model.parameters(), wrap)
    for step in range(2):
        optimizer.zero_grad()
        engines.loss_of(model, engines.part_of(engines.batch(model, step), parts)).backward()
        optimizer.step()
    checkpoint.save(states(model, optimizer, flatten)[0], checkpoint_id=folder)


def continued(rank: int | None, folder: str, wrap: bool, flatten: bool) -> Any:
    """Load the checkpoint into a model of other weights and take the third step; without ``rank``, in this process."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model, parts = (engines.net(), 1) if rank is None else engines.fsdp2()
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    optimizer = made(model.parameters(), wrap)
    state, options = states(model, optimizer, flatten)
    checkpoint.load(state, checkpoint_id=folder)
    weights, of_optimizer = state["model"], state["optimizer"]
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=of_optimizer, options=options)
    x = engines.batch(model, 2)
    optimizer.zero_grad()
    engines.loss_of(model, x if rank is None else engines.part_of(x, parts)).backward()
    optimizer.step()
    return engines.flat(model.parameters()).numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_a_checkpoint_of_two_ranks_resumes_on_one_and_three(flatten: bool, tmp_path: Path) -> None:
    """A checkpoint of two ranks, loaded by one or three, trains on like the uninterrupted run."""
    spawn(2, saved, str(tmp_path), True, flatten)
    expected = engines.alone(engines.net(), partial(made, wrap=True))

    for weights in [continued(None, str(tmp_path), True, flatten), *spawn(3, continued, str(tmp_path), True, flatten)]:
        torch.testing.assert_close(torch.from_numpy(weights), expected, rtol=0, atol=1e-15)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [False, True], ids=["wrapped to plain", "plain to wrapped"])
def test_checkpoints_of_plain_and_wrapped_are_interchangeable(wrap: bool, tmp_path: Path) -> None:
    """A plain optimizer's checkpoint resumes in the wrapped one, and the other way round."""
    spawn(2, saved, str(tmp_path), not wrap, False)
    first, last = partial(made, wrap=not wrap), partial(made, wrap=wrap)
    expected = engines.alone(engines.net(), first, last)

    for weights in spawn(3, continued, str(tmp_path), wrap, False):
        torch.testing.assert_close(torch.from_numpy(weights), expected, rtol=0, atol=1e-15)


def fake_step(rank: int, name: str, as_tensor: bool) -> tuple[bool, int, int]:
    """Prepare a checkpoint; return whether the weights stayed, the number of states, and that of reports."""
    model, _ = engines.fsdp2()
    before = engines.flat(model.parameters())
    cls, _, own = METHODS[name]
    optimizer = cls(AdamW(model.parameters(), lr=torch.tensor(0.01) if as_tensor else 0.01, weight_decay=0.5), **own)
    optimizer.observer = monitor = MaskMonitor()
    states(model, optimizer, flatten=False)
    return torch.equal(before, engines.flat(model.parameters())), len(optimizer.state), len(monitor.ratios)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("name", ["decay", "update", "p-norm"])
def test_preparing_a_checkpoint_moves_no_weight(name: str, as_tensor: bool) -> None:
    """torch makes state by a step with lr 0, in which no weight moves and which no monitor counts."""
    assert [(True, 4, 0)] * 2 == spawn(2, fake_step, name, as_tensor)


# ---- a worker that fails


def trained_on(rank: int, folder: str, until: int) -> Any:
    """Train from the newest complete checkpoint, saving at each step; return how many there were and the weights."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model, parts = engines.fsdp2()
    optimizer = CautiousDecay(AdamW(model.parameters(), lr=0.01, weight_decay=0.5, fused=True))
    whole = sorted(int(metadata.parent.name) for metadata in Path(folder).glob("*/.metadata"))
    if whole:
        state, options = states(model, optimizer, flatten=False)
        checkpoint.load(state, checkpoint_id=f"{folder}/{whole[-1]}")
        weights, of_optimizer = state["model"], state["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=of_optimizer, options=options)
    for step in range(whole[-1] + 1 if whole else 0, until):
        optimizer.zero_grad()
        engines.loss_of(model, engines.part_of(engines.batch(model, step), parts)).backward()
        optimizer.step()
        checkpoint.save(states(model, optimizer, flatten=False)[0], checkpoint_id=f"{folder}/{step}")
    return len(whole), engines.flat(model.parameters()).numpy()


@pytest.mark.filterwarnings("ignore")
def test_a_worker_is_killed_and_training_resumes(tmp_path: Path) -> None:
    """If one of two workers is killed, a restart from the last checkpoint gives the bits of the uninterrupted run."""
    failing = Ranks(2)
    failing.start(trained_on, str(tmp_path / "killed"), 10**6)
    end = time.monotonic() + LIMIT
    while not (tmp_path / "killed" / "3" / ".metadata").exists():
        assert time.monotonic() < end, "the workers wrote no checkpoint"
        time.sleep(0.01)
    failing.processes[1].kill()
    with pytest.raises(AssertionError, match="rank"):
        failing.results()
    failing.kill()
    steps = len(list((tmp_path / "killed").glob("*/.metadata"))) + 3
    (found, weights), _ = spawn(2, trained_on, str(tmp_path / "killed"), steps)
    (none, expected), _ = spawn(2, trained_on, str(tmp_path / "whole"), steps)

    assert (steps - 3, 0) == (found, none)
    assert (weights == expected).all()


# ---- the monitor


def watched(rank: int) -> tuple[list[float], float, float]:
    """The ratios of this rank, the share over all ranks, and a second reading without a step in between."""
    model, parts = engines.fsdp2()
    optimizer = CautiousDecay(AdamW(model.parameters(), lr=0.01, weight_decay=0.5))
    optimizer.observer = monitor = MaskMonitor()
    for step in range(2):
        optimizer.zero_grad()
        engines.loss_of(model, engines.part_of(engines.batch(model, step), parts)).backward()
        optimizer.step()
    return monitor.ratios, monitor.read(over_ranks=True), monitor.read()


def test_the_monitor_reads_all_ranks() -> None:
    """`ratios` covers a rank's shards; `read(over_ranks=True)` covers all weights since the last reading."""
    model = engines.net()
    optimizer = CautiousDecay(AdamW(model.parameters(), lr=0.01, weight_decay=0.5))
    optimizer.observer = monitor = MaskMonitor()
    for step in range(2):
        optimizer.zero_grad()
        engines.loss_of(model, engines.batch(model, step)).backward()
        optimizer.step()
    (first, together, nothing), (second, same, _) = spawn(2, watched)

    assert together == same == monitor.read() == pytest.approx(sum(monitor.ratios) / 2)
    assert first != second
    assert math.isnan(nothing)


def monitored(model: torch.nn.Module, per_parameter: bool) -> MaskMonitor:
    """The monitor after two steps."""
    optimizer = CautiousDecay(AdamW(model.parameters(), lr=0.01, weight_decay=0.5))
    optimizer.observer = monitor = MaskMonitor(per_parameter=per_parameter)
    for step in range(2):
        optimizer.zero_grad()
        engines.loss_of(model, engines.batch(model, step)).backward()
        optimizer.step()
    return monitor


def rows_of(rank: int, per_parameter: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of this rank and those of all ranks, on a mesh with one dimension of shards and one of replicas."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = engines.net()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    monitor = monitored(model, per_parameter)
    return monitor.rows(), monitor.rows(over_ranks=True)


@pytest.mark.parametrize("per_parameter", [False, True])
def test_rows_of_all_ranks_are_those_of_one_process(per_parameter: bool) -> None:
    """With shards and replicas on four ranks, every number over all ranks is that of training in one process."""
    model = engines.net()
    expected = monitored(model, per_parameter).rows()

    for here, together in spawn(4, rows_of, per_parameter):
        assert [row["name"] for row in together] == [row["name"] for row in expected]
        for row, of_one in zip(together, expected, strict=True):
            assert {key: row.pop(key) for key in ("name", "path")} == {key: of_one[key] for key in ("name", "path")}
            assert row == pytest.approx({key: of_one[key] for key in row}, rel=1e-6)
        assert sum(row["weights"] for row in here) < sum(row["weights"] for row in expected)


# ---- averaging


def averaged(rank: int) -> tuple[str, Any]:
    """The error for a wrapper around PostLocalSGDOptimizer, and the weights after steps of a wrapper inside it."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    model = engines.net()
    averager = PeriodicModelAverager(period=1, warmup_steps=0)
    with pytest.raises(ValueError) as refused:
        CautiousDecay(PostLocalSGDOptimizer(SGD(model.parameters(), lr=0.1), averager))
    optimizer = PostLocalSGDOptimizer(CautiousDecay(SGD(model.parameters(), lr=0.1), lam=0.5), averager)
    for step in range(engines.STEPS):
        optimizer.zero_grad()
        engines.loss_of(model, engines.part_of(engines.batch(model, step), 2)).backward()
        optimizer.step()
    return str(refused.value), engines.flat(model.parameters()).numpy()


@pytest.mark.filterwarnings("ignore")
def test_the_wrapper_in_an_averaging_optimizer() -> None:
    """The wrapper is refused around PostLocalSGDOptimizer; inside it, averaging gives all ranks the same weights."""
    (text, weights), (_, others) = spawn(2, averaged)

    assert "which is not an update. Wrap the optimizer inside it" in text
    assert (weights == others).all()


def broken_on_one_rank(rank: int) -> bool:
    """Step with a NaN gradient in one rank's shard, so that this rank cannot tell whether gradients were modified."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    opt = METHODS["update"][0](SGD([p], lr=0.1, momentum=0.9))
    for _ in range(3):
        p.grad = distribute_tensor(torch.tensor([1.0, 1.0, 1.0, math.nan]), mesh, [Shard(0)])
        opt.step()
    return opt._gradients.copied


def test_ranks_may_differ_in_copying_gradients() -> None:
    """Ranks that differ in copying gradients still make the same collectives."""
    assert [False, True] == spawn(2, broken_on_one_rank)

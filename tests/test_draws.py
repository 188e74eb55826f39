"""Ranks and chunks draw by place, as one process does; a seed that is set later; steps in inference mode."""

import copy
from typing import Any

import pytest
import torch
from ranks import spawn
from support import ALL_PATHS, PathOptions, can_run
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from cwd_wrap import CautiousDecay, rules
from cwd_wrap.tensors import Shard, shard

pytestmark = pytest.mark.filterwarnings("ignore:.*is too small for b?float16")
SHAPES = [(5, 3), (1, 7), (4, 6), (3,)]
METHODS = [{"rounding": "stochastic"}, {"mask": "random", "path": "snapshot"}]


def trained(path: PathOptions, method: dict[str, str], place: object = None) -> list[Tensor]:
    """The whole bfloat16 weights after three steps, in the layout that ``place`` makes, with dropout in between."""
    place = place or (lambda t: t)
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(place(torch.randn(shape, generator=generator).bfloat16())) for shape in SHAPES]
    opt = CautiousDecay(AdamW(params, lr=0.01, weight_decay=0.1, **path.base), **{**path, **method})
    for _ in range(3):
        for p in params:
            p.grad = place(torch.randn(p.shape, generator=generator).bfloat16())
        torch.dropout(torch.ones(7), 0.5, train=True)
        opt.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in params]


def check_draws(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    for path in filter(can_run, ALL_PATHS):
        for method in METHODS[: 1 if path["path"] != "snapshot" else None]:
            torch.manual_seed(17)
            alone = trained(path, method)
            for placement in (Replicate(), Shard(0)):
                torch.manual_seed(rank)
                torch.rand(3 * rank)
                ours = trained(
                    path, method, lambda t, to=placement: distribute_tensor(t, mesh, [to], src_data_rank=None)
                )

                assert all(map(torch.equal, ours, alone)), (path, method, placement)


def test_ranks_draw_what_one_process_draws() -> None:
    """Replicas and shards on ranks with different seeds give the weights of one process, bit for bit."""
    pytest.importorskip("torch.distributed.tensor").__dict__.get("DTensor") or pytest.skip("no public DTensor")
    if torch.__version__ < "2.6":
        pytest.skip("distribute_tensor of older torch communicates")
    spawn(2, check_draws)


def check_places(rank: int, shape: tuple[int, ...]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2))
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    dims = [Replicate(), *map(Shard, range(len(shape)))]
    for placements in ((one, other) for one in dims for other in dims):
        t = distribute_tensor(numbers, mesh, placements)
        inner = {p.dim for p in placements if isinstance(p, Shard) and p.dim > 0}
        if len(inner) > 1:
            continue
        offset, run, jump, numel = shard(t)
        local = torch.arange(numel)
        held = local + offset if run >= numel else offset + local // run * jump + local % run

        assert torch.equal(held, t.to_local().flatten()), (rank, placements)


@pytest.mark.parametrize("shape", [(5, 3), (4, 6, 2)], ids=str)
def test_places_of_a_shard(shape: tuple[int, ...]) -> None:
    """On a mesh of four ranks, `shard` gives the right places for no, one or two sharded dimensions."""
    pytest.importorskip("torch.distributed.tensor").__dict__.get("DTensor") or pytest.skip("no public DTensor")
    spawn(4, check_places, shape)


def test_a_plain_tensor_holds_all_places() -> None:
    """A plain tensor is one run of places; a complex number takes two places."""
    assert shard(torch.zeros(3, 4)) == Shard(0, 12, 12, 12)
    assert shard(torch.zeros(3, dtype=torch.complex64)) == Shard(0, 6, 6, 6)


def test_splitmix_is_the_published_one() -> None:
    """The first outputs for the seed 1234567 are those of the reference implementation."""
    words = rules.random_words(torch.tensor(1234567), torch.arange(1, 6))

    assert [int(word) % 2**64 for word in words] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


# ------------------------------------------------------------------------------------ the seed and the counter


def ones(method: dict[str, str], cls: Any = SGD, **options: Any) -> tuple[nn.Parameter, CautiousDecay]:
    """4,096 bfloat16 weights of 1, every other of which moves towards 0: a step decays, or rounds, some of them."""
    p = nn.Parameter(torch.ones(1 << 12, dtype=torch.bfloat16))
    p.grad = torch.tensor([0.5, -0.5], dtype=torch.bfloat16).repeat(1 << 11)
    return p, CautiousDecay(cls([p], lr=0.1), lam=0.25, **method, **options)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_seed_that_is_set_later_is_the_seed_of_the_next_step(method: dict[str, str]) -> None:
    """With another seed another step follows: that of a wrapper built with it; a copy goes on with it, too."""
    (p, opt), (q, twin), (r, other) = ones(method), ones(method, seed=5), ones(method)
    opt.step()
    twin.step()
    other.step()
    assert not torch.equal(p, q)
    q.data.copy_(p.data)
    opt.seed = 5
    copied = copy.deepcopy(opt)
    of_copy = copied.param_groups[0]["params"][0]
    of_copy.grad = p.grad
    for each in (opt, twin, other, copied):
        each.step()

    assert 5 == opt.seed == copied.seed
    assert torch.equal(p, q)
    assert not torch.equal(p, r)
    assert torch.equal(p, of_copy)


class Fails(SGD):
    """Raises in its step, after the closure, if it is told to."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        if self.fails:
            raise KeyError
        super().step()
        return loss


def in_the_base(opt: CautiousDecay) -> None:
    opt.base_optimizer.fails = True  # type: ignore[attr-defined]
    try:
        opt.step()
    finally:
        opt.base_optimizer.fails = False  # type: ignore[attr-defined]


def in_a_hook(opt: CautiousDecay) -> None:
    handle = opt.base_optimizer.register_step_pre_hook(lambda *_: {}["a batch"])
    try:
        opt.step()
    finally:
        handle.remove()


def by_a_bad_number(opt: CautiousDecay) -> None:
    opt.param_groups[0]["lr"] = "0.1"
    try:
        opt.step()
    finally:
        opt.param_groups[0]["lr"] = 0.1


FAILING: dict[str, tuple[Any, Any]] = {
    "closure": (SGD, lambda opt: opt.step(lambda: {}["a batch"])),
    "closure of a stranger": (Fails, lambda opt: opt.step(lambda: {}["a batch"])),
    "base": (Fails, in_the_base),
    "hook": (SGD, in_a_hook),
    "bad number": (SGD, by_a_bad_number),
}


@pytest.mark.parametrize(("cls", "fail"), FAILING.values(), ids=list(FAILING))
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_step_that_raised_is_not_counted(method: dict[str, str], cls: Any, fail: Any) -> None:
    """The next step draws what it would have drawn without it, also in a copy and after the first step."""
    (p, opt), (q, twin) = ones(method, cls=cls), ones(method, cls=cls)
    for _ in range(3):
        with pytest.raises((KeyError, TypeError)):
            fail(opt)
        copied = copy.deepcopy(opt)
        of_copy = copied.param_groups[0]["params"][0]
        of_copy.grad = p.grad
        for each in (opt, twin, copied):
            each.step()

        assert torch.equal(p, q)
        assert torch.equal(p, of_copy)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_step_without_gradients_is_counted(method: dict[str, str]) -> None:
    """So it is on ranks that have none in a step in which others do: they draw the same in the next one."""
    (p, opt), (q, twin) = ones(method), ones(method)
    gradient, p.grad = p.grad, None
    opt.step()
    p.grad = gradient
    twin.step()
    q.data.fill_(1.0)
    opt.step()
    twin.step()

    assert torch.equal(p, q)


def test_a_checkpoint_that_is_loaded_in_a_step_begins_the_count_anew() -> None:
    """A closure loads it, and the next step draws what a first one does."""
    (p, opt), (q, twin) = ones(METHODS[0], cls=Fails), ones(METHODS[0], cls=Fails)
    opt.step(lambda: opt.load_state_dict(opt.state_dict()))
    p.data.fill_(1.0)
    opt.step()
    twin.step()

    assert torch.equal(p, q)


@pytest.mark.parametrize("seed", ["x", 0.5, True, -1, 2**63, None, torch.tensor(1)], ids=str)
def test_a_wrong_seed_is_refused_where_it_is_given(seed: Any) -> None:
    """A seed that is no int from 0 up to 2**63 - 1 raises at once, and the old one stays."""
    _, opt = ones({}, seed=3)
    with pytest.raises(TypeError, match=r"seed=.*: pass an int from 0 up to 2\*\*63 - 1"):
        opt.seed = seed
    with pytest.raises(TypeError, match=r"seed=.*: pass an int from 0 up to 2\*\*63 - 1"):
        ones({}, seed=seed)

    assert 3 == opt.seed


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("inside", [(0,), (1,), (0, 2), (1, 2)], ids=str)
def test_steps_in_inference_mode_draw_the_same(method: dict[str, str], inside: tuple[int, ...]) -> None:
    """Steps in inference mode, the first or later ones, draw the same numbers, and those outside go on."""
    (p, opt), (q, twin) = ones(method), ones(method)
    for step in range(4):
        twin.step()
        with torch.inference_mode(mode=step in inside):
            opt.step()

    assert torch.equal(p, q)


@pytest.mark.parametrize("path", ["direction", "one_pass"])
def test_a_tensor_of_several_chunks_draws_by_place(path: str) -> None:
    """numba takes a long tensor in chunks: each weight has the random numbers of its place."""
    chunk = pytest.importorskip("cwd_wrap.kernels._walk").CHUNK
    found = []
    for backend in ("eager", "numba"):
        p = nn.Parameter(torch.ones(chunk + 8, dtype=torch.bfloat16))
        p.grad = torch.full_like(p, 2.0**-10)
        opt = CautiousDecay(SGD([p], lr=0.5), lam=2.0**-10, rounding="stochastic", seed=3, path=path, backend=backend)
        opt.step()
        found.append(p.detach())

    assert 0 < (found[0] != 1).sum() < len(found[0])
    assert torch.equal(*found)

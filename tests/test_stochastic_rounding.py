"""rounding="stochastic": 16-bit weights decay by eta*lam on average, however small it is, and nothing else changes."""

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from processes import call
from support import ALL_PATHS, PathOptions, can_run, net, param, same, train, values, weight
from torch import Tensor
from torch.optim import SGD, AdamW

from cwd_wrap import CautiousDecay, rules
from cwd_wrap.draws import Draws
from cwd_wrap.kernels import Backend, choose
from cwd_wrap.kernels.buckets import Coming, Stepped
from cwd_wrap.tensors import Shard

ROOT = Path(__file__).parents[1]
NARROW = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is too small for b?float16"
)  # from the comparisons with rounding to nearest
both_types = pytest.mark.parametrize("dtype", NARROW, ids=str)
MANY = 100_000
STEPS, LR, LAM = 25, 0.1, 1e-3  # eta*lam = 1e-4
both_backends = pytest.mark.parametrize(
    "kernel", [param(name, path=PathOptions(backend=name)) for name in ("eager", "numba")]
)
ROUNDED = {"strict": False, "count": False}


def all_finite(dtype: torch.dtype) -> Tensor:
    """Every finite number of a 16-bit type, in order, as float32."""
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).float()
    return numbers[numbers.isfinite()].unique()


def neighbours(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest number of ``dtype`` that is not above ``wide``, and the smallest that is not below it."""
    table = all_finite(dtype)
    return table[torch.searchsorted(table, wide, right=True) - 1], table[torch.searchsorted(table, wide)]


def sigmas(errors: Tensor) -> float:
    """The mean of independent errors, in units of the mean's standard deviation."""
    errors = errors.double()
    return float(errors.mean() / (errors.std() / math.sqrt(errors.numel())))


def weights(kind: str, dtype: torch.dtype) -> Tensor:
    """Weights of both signs, normal or subnormal."""
    x = torch.randn(MANY)
    return (x.sign() * torch.randint(1, 1 << 10, (MANY,)) * 2.0**-24).to(dtype) if kind == "subnormal" else x.to(dtype)


def decayed(x: Tensor, rounding: str, steps: int = STEPS, **options: object) -> Tensor:
    """``x`` after wrapped steps with update 0, each of which decays every weight by 1e-4 of itself."""
    p = torch.nn.Parameter(x.clone())
    p.grad = torch.zeros_like(x)
    base = {"fused": True} if options.get("path") == "one_pass" else {}
    opt = CautiousDecay(SGD([p], lr=LR, **base), lam=LAM, rounding=rounding, **options)
    for _ in range(steps):
        opt.step()
    return p.detach()


def backend_of(name: str) -> Backend:
    return choose(name, torch.device("cpu"))


def draws(*tensors: Tensor, step: int = 0) -> Draws:
    """The random numbers of a step for whole parameters 0, 1, ..."""
    stream = rules.stream(torch.tensor(0), torch.tensor(step)).to(tensors[0].device)
    return Draws(stream, range(len(tensors)), [Shard(0, t.numel(), t.numel(), t.numel()) for t in tensors])


def stepped(w: list[Tensor], eta_lam: float | Tensor) -> Stepped:
    """Weights that a step did not move."""
    return Stepped(w, w, [t.clone() for t in w], None, eta_lam, draws(*w))


# ---- the rule


def test_by_eye() -> None:
    """1 - 2**-10 is a quarter of the gap below 1, so it rounds down to 1 - 2**-8 with chance 1/4."""
    wide, random = torch.full((4,), 1 - 2**-10), torch.tensor([0.0, 0.24, 0.25, 0.99])
    down = 1 - 2**-8

    assert rules.stochastic_rounding(wide, torch.bfloat16, random).tolist() == [down, down, 1.0, 1.0]


@pytest.mark.parametrize("share", [1 / 16, 1 / 2, 3 / 4])
@both_types
def test_the_chance_is_the_share_of_the_gap(dtype: torch.dtype, share: float) -> None:
    """Between any two neighbours, subnormals and powers of two included, the mean over all random numbers is exact."""
    table = all_finite(dtype)
    low, high = table[:-1], table[1:]
    wide = low + (high - low) * share
    up = torch.zeros(len(wide))
    for k in range(16):
        rounded = rules.stochastic_rounding(wide, dtype, torch.full_like(wide, (k + 0.5) / 16)).float()
        assert ((rounded == low) | (rounded == high)).all()
        up += rounded == high

    assert torch.equal(up / 16, torch.full_like(up, share))


@both_types
def test_numbers_of_the_type_do_not_change(dtype: torch.dtype) -> None:
    """Each of the type's 65,536 bit patterns stays the same, infinities and signed zeros included; NaN stays NaN."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    for random in (0.0, 0.5, 1 - 2**-24):
        rounded = rules.stochastic_rounding(every.float(), dtype, torch.full(every.shape, random))

        assert rounded.isnan().equal(every.isnan())
        assert torch.equal(rounded.view(torch.int16)[~every.isnan()], every.view(torch.int16)[~every.isnan()])


def test_overflow_is_that_of_rounding_to_nearest() -> None:
    """Beyond the largest number of the type the result is the one that ``.to`` gives."""
    wide = torch.tensor([65504.0, 65519.0, 65520.0, 65536.0, 1e30, -65519.0, -1e30])
    for random in (0.0, 0.99):
        rounded = rules.stochastic_rounding(wide, torch.float16, torch.full_like(wide, random))

        assert torch.equal(rounded, wide.to(torch.float16))


# ---- the mean


def test_one_step_of_ones(every_path: PathOptions) -> None:
    """100,000 ones with eta*lam = 2**-10 land on 1 and 1 - 2**-8 only, and on average on 1 - 2**-10."""
    p = torch.nn.Parameter(torch.ones(MANY, dtype=torch.bfloat16))
    p.grad = torch.zeros_like(p)
    CautiousDecay(SGD([p], lr=0.5, **every_path.base), lam=2**-9, **every_path, rounding="stochastic").step()

    assert set(p.tolist()) == {1.0, 1 - 2**-8}
    assert abs(sigmas(p.detach().float() - (1 - 2**-10))) < 5


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.bfloat16, "normal"), (torch.float16, "normal"), (torch.float16, "subnormal")],
    ids=["bf16", "fp16", "fp16 subnormal"],
)
def test_the_mean_is_that_of_float32(dtype: torch.dtype, kind: str, every_path: PathOptions) -> None:
    """Rounding to nearest changes 0 of 100,000 weights; the mean of stochastic rounding is the float32 decay.

    The check would reject rounding to nearest, and a decay that is a tenth off.
    """
    x = weights(kind, dtype)
    wide = decayed(x.float(), "stochastic", **every_path)
    narrow = decayed(x, "stochastic", **every_path).float()
    plain = decayed(x, "nearest", **every_path)
    error = (narrow - wide) * x.sign()

    assert torch.equal(plain, x)
    assert abs(sigmas(error)) < 5
    assert abs(sigmas(error + (wide - plain.float()) * x.sign())) > 5
    assert abs(sigmas(error + (wide - x.float()) * x.sign() / 10)) > 5


@pytest.mark.parametrize("mask", ["gradient", "random", "all"])
def test_the_mean_under_the_ablations(mask: str) -> None:
    """With an ablation's mask, here 1 everywhere, weights decay by eta*lam on average."""
    x = weights("normal", torch.bfloat16)
    error = decayed(x, "stochastic", 20, mask=mask).float() - decayed(x.float(), "stochastic", 20, mask=mask)

    assert abs(sigmas(error * x.sign())) < 5


@both_backends
def test_a_tensor_learning_rate(kernel: str) -> None:
    """eta*lam as a tensor decays by the same on average."""
    x = torch.ones(MANY, dtype=torch.bfloat16)
    backend_of(kernel).decay_from_snapshot([stepped([x], torch.tensor(1e-3))], **ROUNDED)

    assert abs(sigmas(x.float() - (1 - 1e-3))) < 5


# ---- nothing else changes


@both_types
def test_only_the_two_neighbours_occur(every_path: PathOptions, dtype: torch.dtype) -> None:
    """Each result is one of the two neighbours of the float32 value, and both occur."""
    x = weights("normal", dtype)
    low, high = neighbours(decayed(x.float(), "nearest", 1, **every_path), dtype)
    one = decayed(x, "stochastic", 1, **every_path).float()

    assert ((one == low) | (one == high)).all()
    assert (one == low).any()
    assert (one == high).any()


@both_types
@pytest.mark.parametrize("path", [param(path, path=path) for path in ALL_PATHS if path["path"] != "one_pass"])
def test_masked_weights_keep_their_bits(path: PathOptions, dtype: torch.dtype) -> None:
    """A masked weight has the bits of the base's step. (One pass rounds the whole step.)"""
    x = weights("normal", dtype)
    p, alone = torch.nn.Parameter(x.clone()), torch.nn.Parameter(x.clone())
    p.grad = alone.grad = torch.randn(MANY).to(dtype)
    SGD([alone], lr=1.0).step()
    grown = (alone > x) & (x > 0) | (alone < x) & (x < 0)  # without steps that round away, which a snapshot misses
    CautiousDecay(SGD([p], lr=1.0), lam=0.01, **path, rounding="stochastic").step()

    assert torch.equal(p.view(torch.int16)[grown], alone.view(torch.int16)[grown])
    assert (p != alone)[~grown].float().mean() > 0.1


@both_types
@both_backends
def test_special_values_are_those_of_rounding_to_nearest(dtype: torch.dtype, kernel: str) -> None:
    """Every pair of zeros, infinities and NaN gives the bits that rounding to nearest gives."""
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan], dtype=dtype)
    w, x = (t.reshape(-1) for t in torch.meshgrid(special, special, indexing="ij"))
    along, after = w.clone(), w.clone()
    backend_of(kernel).decay_along([Coming([along], [x], None, 0.0, 1.0, 0.5, draws(w))], **ROUNDED)
    backend_of(kernel).decay_from_snapshot([Stepped([after], [after], [x], None, 0.5, draws(w))], **ROUNDED)
    masks = (rules.aligned(x, w, strict=False), rules.moved_towards_zero(x, w, strict=False))
    nearest = (rules.decay(w, w, masks[0], 0.5), rules.decay(w, x, masks[1], 0.5))
    for one, other in zip((along, after), nearest, strict=True):
        assert torch.equal(*(t.nan_to_num(nan=3.0, posinf=4.0, neginf=5.0).view(torch.int16) for t in (one, other)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_weights_decay_as_before(dtype: torch.dtype, every_path: PathOptions) -> None:
    """float32 and float64 weights decay as with rounding to nearest."""
    x = weights("normal", dtype)

    assert torch.equal(decayed(x, "stochastic", 1, **every_path), decayed(x, "nearest", 1, **every_path))


def test_no_generator_is_used(every_path: PathOptions) -> None:
    """Rounding neither advances nor depends on torch's generator."""
    x, runs = weights("normal", torch.bfloat16), []
    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        runs.append(decayed(x, "stochastic", 3, **every_path))

        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*runs)


@both_backends
def test_equal_tensors_draw_different_numbers(kernel: str) -> None:
    """Two equal tensors, and two blocks of one tensor, get different random numbers."""
    sizes = [1000, 1000, 20_000, 20_000, 2 << 20]
    w = [torch.ones(n, dtype=torch.bfloat16) for n in sizes]
    backend_of(kernel).decay_from_snapshot([stepped(w, 2**-9)], **ROUNDED)
    for one, other in ((w[0], w[1]), (w[2], w[3]), w[4].chunk(2)):
        assert 0.45 < (one == other).float().mean() < 0.55


# ---- seeds and checkpoints


def test_the_seed_gives_the_run(every_path: PathOptions) -> None:
    """The same ``seed`` gives the same run, and another seed gives another run."""
    x = weights("normal", torch.bfloat16)
    runs = [decayed(x, "stochastic", 3, seed=seed, **every_path) for seed in (1, 1, 2)]

    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("seed", [-1, 1.5, "1", None, 1 << 63, True])
def test_unfit_seeds(seed: object) -> None:
    """A seed that is no int from 0 up to 2**63 - 1 is refused."""
    with pytest.raises(TypeError, match=r"seed=.*: pass an int from 0 up to 2\*\*63 - 1"):
        CautiousDecay(SGD([weight(1.0)], lr=0.1), lam=0.1, seed=seed)


def test_steps_draw_different_numbers() -> None:
    """Each step draws new numbers, whether the base counts its steps or not."""
    for base in (SGD, AdamW):
        p = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
        p.grad = torch.zeros_like(p)
        opt, moved = CautiousDecay(base([p], lr=1.0, weight_decay=2**-9), rounding="stochastic"), []
        for _ in range(3):
            torch.nn.init.ones_(p)
            opt.step()
            moved.append(p.detach() != 1)
        for one, other in ((0, 1), (1, 2), (0, 2)):
            assert 0.4 < (moved[one] == moved[other]).float().mean() < 0.6


def test_the_mean_over_steps_of_a_weight_that_stays() -> None:
    """With a constant weight and a zero gradient, the mean decay over 2,000 steps is eta*lam; every place decays."""
    p = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    p.grad = torch.zeros_like(p)
    opt, lost = CautiousDecay(SGD([p], lr=0.25), lam=2**-10, rounding="stochastic"), torch.zeros(64)
    for _ in range(2000):
        torch.nn.init.ones_(p)
        opt.step()
        lost += 1 - p.detach().float()
    expected = 2000 * 0.25 * 2**-10

    assert lost.mean().item() == pytest.approx(expected, rel=0.05)
    assert (lost > expected / 2).all()


def resume(file: Path) -> None:
    """Take four more steps from the checkpoints of a file, at another torch seed, and write the weights there."""
    torch.set_num_threads(1)
    saved, resumed, paths = torch.load(file), [], {str(path): path for path in ALL_PATHS}
    for path, states in saved.items():
        torch.manual_seed(99)
        model, opt = narrow_net(paths[path])
        model.load_state_dict(states["model"])
        opt.load_state_dict(states["optimizer"])
        train(model.float_in, opt, range(4, 8))
        resumed.append(values(model))
    torch.save(resumed, file)


def narrow_net(path: PathOptions) -> tuple[torch.nn.Module, CautiousDecay]:
    """A bfloat16 net that takes float32 batches through ``float_in``, and its optimizer."""
    model = net().to(torch.bfloat16)
    base = AdamW(model.parameters(), lr=0.01, weight_decay=0.5, **path.base)
    model.float_in = lambda x: model(x.to(torch.bfloat16)).float()
    return model, CautiousDecay(base, **path, rounding="stochastic")


def test_resume_is_exact(tmp_path: Path) -> None:
    """Four steps, a checkpoint, and four more in another process with another torch seed equal eight steps."""
    file, saved, expected = tmp_path / "checkpoint.pt", {}, []
    for path in filter(can_run, ALL_PATHS):
        model, opt = narrow_net(path)
        train(model.float_in, opt, range(4))
        states = {"model": model.state_dict(), "optimizer": opt.state_dict()}
        saved[str(path)] = copy.deepcopy(states)
        train(model.float_in, opt, range(4, 8))
        expected.append(values(model))
    torch.save(saved, file)
    call(resume, file)

    assert all(map(torch.equal, torch.load(file), expected))


def test_a_copy_draws_the_same_numbers() -> None:
    """A copied and a pickled wrapper draw the original's next numbers, also around a base without a counter."""
    p = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 2**-9)
    opt = CautiousDecay(SGD([p], lr=1.0), lam=2**-9, rounding="stochastic")
    opt.step()
    after = []
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), opt):
        (q,) = other.param_groups[0]["params"]
        q.grad = p.grad.clone()
        other.step()
        after.append(q.detach())

    assert torch.equal(after[0], after[2])
    assert torch.equal(after[1], after[2])


def test_the_state_dict_is_the_plain_optimizers() -> None:
    """After training, the state dict has the plain optimizer's groups and keys."""
    dicts = []
    for wrap in (lambda base: base, lambda base: CautiousDecay(base, rounding="stochastic")):
        model, _ = narrow_net(PathOptions())
        opt = wrap(AdamW(model.parameters(), lr=0.01, weight_decay=0.5))
        train(model.float_in, opt, range(2))
        dicts.append(opt.state_dict())
    plain, ours = dicts

    assert same(plain["param_groups"], ours["param_groups"])
    assert {i: list(s) for i, s in plain["state"].items()} == {i: list(s) for i, s in ours["state"].items()}


# ---- the argument


def test_unknown_rounding() -> None:
    """An unknown rounding raises an error that lists the two names."""
    with pytest.raises(ValueError, match=r"unknown rounding 'up': pass one of 'nearest', 'stochastic'"):
        CautiousDecay(SGD([weight(1.0)], lr=0.1), lam=0.1, rounding="up")


def test_copies_and_over_keep_the_rounding() -> None:
    """Pickled and copied optimizers and those from `over` keep their rounding; the default is "nearest"."""
    opt = CautiousDecay(SGD([weight(1.0)], lr=0.1), lam=0.1, rounding="stochastic")
    made = CautiousDecay.over(SGD, rounding="stochastic")([weight(1.0)], lr=0.1, weight_decay=0.1)

    assert [o.rounding for o in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt), made)] == ["stochastic"] * 3
    assert CautiousDecay(SGD([weight(1.0)], lr=0.1), lam=0.1).rounding == "nearest"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@both_types
def test_on_a_card(dtype: torch.dtype) -> None:
    """Triton's mean is the float32 decay, and each replay of a CUDA graph draws new numbers."""
    kernel = pytest.importorskip("cwd_wrap.kernels._triton", exc_type=ImportError)
    x = torch.ones(MANY, device="cuda", dtype=dtype)
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    w, results = x.clone(), []
    of_w = draws(w)

    def work() -> None:
        w.copy_(x)
        step.add_(1)
        drawn = of_w._replace(stream=rules.stream(torch.tensor(0), step))
        kernel.decay_from_snapshot([Stepped([w], [w], [x], None, 1e-4, drawn)], **ROUNDED)

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(2):
        graph.replay()
        results.append(w.clone())

    assert all(abs(sigmas(result - (x.float() - 1e-4))) < 5 for result in results)
    assert not torch.equal(*results)

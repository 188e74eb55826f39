"""The same decay from others: how long is a step, beside the plain step of an optimizer with its own decay?

python benchmarks/peers.py               needs the extra `peers`, and a C++ compiler for HeavyBall
python benchmarks/peers.py --rounds 3    a quick look

All step the same weights, in turn, each with a state of its own and with new gradients in every step (HeavyBall frees
them: a second step without would do nothing). Each is first seen to decay, and to decay where its update agrees only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from common import GPT_42_M, SIX, Table, arguments, duration, interleaved_steps, parameters, ratio, renewing_gradients
from torch.optim import AdamW, Optimizer

from cwd_wrap import CautiousDecay

LR, LAM = 1e-3, 0.1
LARGE = "42 M weights", GPT_42_M, 20
SMALL = "six tensors", SIX, 1000


def adamw(params: list[torch.nn.Parameter], lam: float, **options: Any) -> Optimizer:
    return AdamW(params, lr=LR, weight_decay=lam, **options)


def ours(params: list[torch.nn.Parameter], lam: float, **options: Any) -> Optimizer:
    return CautiousDecay(adamw(params, lam, **options))


class ByHand(AdamW):
    """The usual lines around a step."""

    def __init__(self, params: list[torch.nn.Parameter], lam: float, **options: Any) -> None:
        super().__init__(params, lr=LR, weight_decay=0.0, **options)
        self.lam = lam

    @torch.no_grad()
    def step(self) -> None:
        weights = self.param_groups[0]["params"]
        before = [p.clone() for p in weights]
        super().step()
        for p, x in zip(weights, before, strict=True):
            p.sub_(LR * self.lam * x * ((x - p) * x >= 0))


def heavyball(params: list[torch.nn.Parameter], lam: float) -> Optimizer:
    import heavyball

    few = len(params) < 20  # gcc 12 fails on the code that torch.compile makes for all tensors of the large model
    return heavyball.AdamW(params, lr=LR, weight_decay=lam, cautious_weight_decay=True, multi_tensor=few)


def adv_optm(params: list[torch.nn.Parameter], lam: float) -> Optimizer:
    from adv_optm import AdamW_adv

    return AdamW_adv(params, lr=LR, weight_decay=lam, cautious_wd=True)


def adam_atan2(params: list[torch.nn.Parameter], lam: float) -> Optimizer:
    from adam_atan2_pytorch import AdamAtan2

    return AdamAtan2(params, lr=LR, weight_decay=lam, cautious_wd=True)


def lion(params: list[torch.nn.Parameter], lam: float) -> Optimizer:
    from lion_pytorch import Lion

    return Lion(params, lr=LR, weight_decay=lam)


def cautious_lion(params: list[torch.nn.Parameter], lam: float) -> Optimizer:
    from lion_pytorch.cautious_lion import Lion

    return Lion(params, lr=LR, weight_decay=lam, cautious_factor=1.0, cautious_wd=True)  # no mask on the update


@dataclass(frozen=True)
class Peer:
    """A row. ``takes_options``: it is built with the options of the plain optimizer."""

    name: str
    make: Callable[..., Optimizer]
    package: str = "torch"
    takes_options: bool = False


ADAM = [
    Peer("AdamW, plain", adamw, takes_options=True),
    Peer("cwd_wrap around it", ours, "cwd-wrap", takes_options=True),
    Peer("five lines around it", ByHand, takes_options=True),
    Peer("adv_optm", adv_optm, "adv-optm"),
    Peer("heavyball", heavyball, "heavyball"),
    Peer("adam-atan2-pytorch", adam_atan2, "adam-atan2-pytorch"),
]
LION = [
    Peer("lion-pytorch's Lion, plain", lion, "lion-pytorch"),
    Peer("cwd_wrap around it", lambda p, lam: CautiousDecay(lion(p, lam)), "lion-pytorch"),
    Peer("lion-pytorch's cautious Lion", cautious_lion, "lion-pytorch"),
]
TABLES = {
    "peers": (ADAM, [(LARGE, {"fused": True}), (SMALL, {"fused": True}), (LARGE, {}), (SMALL, {})]),
    "peers-lion": (LION, [(LARGE, {}), (SMALL, {})]),
}


def absent(peer: Peer) -> str | None:
    """The reason why a peer cannot run here."""
    try:
        version(peer.package)
        check_decay(peer)
    except PackageNotFoundError:
        return "not installed"
    except AssertionError:
        raise
    except Exception as error:
        return f"fails with {type(error).__name__}"


def check_decay(peer: Peer) -> None:
    """A first step decays by ``LR * LAM``: everywhere if plain, else where weight and gradient have one sign."""
    x = torch.randn(1000).sign() * (0.5 + torch.rand(1000))
    g = torch.randn(1000)
    stepped = []
    for lam in (LAM, 2 * LAM):
        p = torch.nn.Parameter(x.clone())
        p.grad = g.clone()
        peer.make([p], lam).step()
        stepped.append(p.detach())
    decayed = (stepped[0] - stepped[1]) / (LR * LAM * x)
    wanted = torch.ones(1000) if "plain" in peer.name else (g * x > 0).float()
    torch.testing.assert_close(decayed, wanted, rtol=0, atol=0.01, msg=f"{peer.name} does not decay as it should")


def cells(peers: list[Peer], model: tuple[str, Any, int], options: dict[str, bool], rounds: int | None) -> list[str]:
    """The time and the ratio of each."""
    torch.manual_seed(0)
    _, shapes, usual = model
    weights = parameters(shapes)
    optimizers = {peer.name: peer.make(weights, LAM, **options if peer.takes_options else {}) for peer in peers}
    seconds = interleaved_steps(optimizers, rounds or usual, renewing_gradients(weights))
    baseline = seconds[peers[0].name]
    return [f"{duration(times)}, {ratio(times, baseline)}" for times in seconds.values()]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, (peers, settings) in TABLES.items():
        reasons = {peer.name: absent(peer) for peer in peers}
        there = [peer for peer in peers if reasons[peer.name] is None]
        heads = [f"{model[0]}, {'fused' if how else 'default'}" for model, how in settings]
        table = Table(name, "", "from", *(heads if peers is ADAM else [model[0] for model, _ in settings]))
        if reasons[peers[0].name] is None:
            columns = [cells(there, model, how, options.rounds) for model, how in settings]
            for peer, *found in zip(there, *columns, strict=True):
                table.row(peer.name, f"{peer.package} {version(peer.package)}", *found)
        for peer in peers:
            if reason := reasons[peer.name]:
                table.row(peer.name, f"{peer.package}: {reason}", *[""] * len(settings))
        if options.write:
            table.write()


if __name__ == "__main__":
    main()

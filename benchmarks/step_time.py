"""How long is a step, beside the plain step of the same optimizer on the same weights and the same state?

python benchmarks/step_time.py                        all rows
python benchmarks/step_time.py --rows six "42 M, SGD"  the rows that have one of these in their name
python benchmarks/step_time.py --rounds 3             a quick look

The plain and the wrapped step take turns, and every step has new gradients, as after a backward pass. A row whose steps
do not change weights and state ends the run with an error. The last column is what we aim at.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from common import GPT_42_M, SIX, Table, arguments, duration, interleaved_steps, parameters, ratio, renewing_gradients
from torch.optim import Optimizer

from cwd_wrap import CautiousDecay, CautiousUpdate, PNormDecay

SETTINGS = {"lr": 1e-3, "weight_decay": 0.1}
MODELS = {  # name: shapes and rounds
    "six tensors": (SIX, 2000),
    "1,000 of 64": ([(64,)] * 1000, 200),
    "30 of 4,500": ([(4500,)] * 30, 500),
    "42 M": (GPT_42_M, 40),
    # One piece. A step of Muon on larger ones takes minutes on a CPU that has no fast products of bfloat16.
    "24 matrices": ([(384, 128), (128, 128), (512, 128), (128, 512)] * 6, 10),
}


@dataclass(frozen=True)
class Case:
    """One row: an optimizer of torch, its options, and what it is wrapped in."""

    model: str
    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    aim: str = ""
    method: Callable[..., Optimizer] = CautiousDecay

    @property
    def name(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        method = "" if self.method is CautiousDecay else f" in {self.method.__name__}"
        return f"{self.model}, {self.optimizer}({options}){method}{f', {self.path}' if self.path else ''}"


FUSED, DEFAULT, MOMENTUM = {"fused": True}, {}, {"momentum": 0.9}
TABLES = {
    "small": [
        Case("six tensors", "AdamW", FUSED, aim="0.9"),
        Case("six tensors", "AdamW", DEFAULT, aim="0.5"),
        Case("six tensors", "AdamW", FUSED, "direction", aim="+40 us"),
        Case("six tensors", "AdamW", FUSED, "snapshot", aim="+40 us"),
        Case("six tensors", "AdamW", FUSED, "pieces", aim="as snapshot"),
        Case("1,000 of 64", "AdamW", FUSED, aim="0.2"),
        Case("1,000 of 64", "AdamW", DEFAULT),
        Case("1,000 of 64", "AdamW", FUSED, "direction"),
        Case("1,000 of 64", "AdamW", FUSED, "snapshot"),
        Case("30 of 4,500", "AdamW", FUSED),
        Case("30 of 4,500", "AdamW", DEFAULT),
    ],
    "large": [
        Case("42 M", "AdamW", DEFAULT, aim="0.3"),
        Case("42 M", "Adam", DEFAULT),
        Case("42 M", "SGD", DEFAULT | MOMENTUM, aim="0.3"),
        Case("42 M", "SGD", DEFAULT),
        Case("42 M", "AdamW", FUSED, aim="0.95"),
        Case("42 M", "Adam", FUSED, aim="1.0"),
        Case("42 M", "SGD", FUSED | MOMENTUM, aim="1.0"),
        Case("42 M", "SGD", FUSED, aim="1.0"),
        Case("42 M", "AdamW", FUSED, "direction", aim="1.6"),
        Case("42 M", "AdamW", FUSED, "snapshot", aim="1.86"),
        Case("42 M", "AdamW", {"foreach": True}),
        Case("24 matrices", "Muon"),
    ],
    "others": [
        *(Case("42 M", name, aim="0.3") for name in ("NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax", "Adadelta")),
        Case("42 M", "AdamW", DEFAULT, method=CautiousUpdate, aim="0.4"),
        Case("42 M", "AdamW", DEFAULT, method=PNormDecay, aim="0.4"),
    ],
}


def measured(case: Case, rounds: int | None) -> list[str]:
    """The cells of a row."""
    if not hasattr(torch.optim, case.optimizer):
        return [case.name, f"this torch has no {case.optimizer}", *[""] * 4, case.aim]
    torch.manual_seed(0)
    shapes, usual = MODELS[case.model]
    weights = parameters(shapes)
    base = getattr(torch.optim, case.optimizer)(weights, **SETTINGS, **case.options)
    opt = case.method(base, **{"path": case.path} if case.path else {})
    steps = {"plain": base, "wrapped": opt}
    plain, wrapped = interleaved_steps(steps, rounds or usual, renewing_gradients(weights)).values()
    above = [b - a for a, b in zip(plain, wrapped, strict=True)]
    (path,) = opt.paths()
    return [
        case.name, path.path, duration(plain), duration(wrapped), duration(above), ratio(wrapped, plain), case.aim,
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", nargs="+", default=[""], metavar="PART", help="parts of the names of rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, cases in TABLES.items():
        chosen = [case for case in cases if any(part in case.name for part in options.rows)]
        if not chosen:
            continue
        table = Table(name, "", "path", "plain", "wrapped", "above plain", "ratio (quartiles)", "aim")
        for case in chosen:
            table.row(*measured(case, options.rounds))
        if options.write:
            table.write()


if __name__ == "__main__":
    main()

"""Writes optimizers.md: every optimizer of the conformance test, the path it takes, and whether the rule holds.

python docs/make_optimizer_table.py            (needs the test extra: the optimizers themselves)
"""

import sys
import warnings
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from test_conformance import LAM, make_groups  # noqa: E402
from zoo import Case, cases  # noqa: E402

from cwd_wrap import CautiousDecay  # noqa: E402

HEAD = """# Which optimizer

**{holds} optimizers work**; {other} do not, or cannot be run here. The table gives the reason for each of these.

[A test](../tests/test_conformance.py) checks each step of each optimizer. It computes the optimizer's own step without
decay, adds the cautious decay in float64, and compares. The wrapped result must be the same up to one rounding (up to
four where the decay comes before the step).

- **path**: [one_pass and direction](how_it_works.md#four-paths) need no memory, pieces needs 64 MiB or the largest
  tensor, snapshot needs a copy of the decaying weights.
  The table has the path for the default options on the CPU with numba. `fused=True` turns direction into one_pass for
  torch's AdamW, Adam and SGD. `momentum` in RMSprop, `capturable` in NAdam and `caution` in timm's optimizers turn
  direction into pieces. `opt.paths()` shows yours.
- **works**: whether the test above passes.
- **eta** is the factor by which the optimizer multiplies its own decay, [measured](../tests/test_own_decay.py). It is
  `lr` unless the remarks name another one. *given*: with the default options eta is not one number, and the wrapper
  raises an error. The error says why and which option changes that. Or pass `step_size=`.
- **fades**: each step follows the rule, but the optimizer pulls weights back to a copy of its own, so decay is weaker.
- Versions: torch 2.14.1, timm 1.0.31, torch_optimizer 0.3.0, pytorch_optimizer 4.1.0, lion-pytorch 0.2.5,
  prodigyopt 1.1.2, dadaptation 3.2, schedulefree 1.4.1.

`python docs/make_optimizer_table.py` writes this page.

## The table

| optimizer | path | works | remarks |
|---|---|---|---|
"""


def row(case: Case) -> str:
    if case.refused:
        return f"| {case.name} | - | no | {case.refused} |"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = CautiousDecay(
            case.build(make_groups(case, LAM)),
            None if case.decay_key else LAM,
            step_size=(lambda _: 1.0) if case.eta == "given" else None,
        )
    remarks = [
        f"eta: {case.eta}" if case.eta != "lr" else "",
        "no `weight_decay` of its own: pass `lam=`" if not case.decay_key else "",
        f"has a second decay, `{case.decays}`, which stays" if case.decays and "1d" not in case.decays else "",
        "`weight_decay_1d` is switched off with it" if case.decays and "1d" in case.decays else "",
        "keeps its trust ratio in groups that decay" if case.adapts is not None else "",
        f"fades: {case.fades}" if case.fades else "",
        "`step` needs a closure" if case.closure else "",
        "gradients need a graph" if case.create_graph else "",
        "only rows in the sparse gradient decay" if case.sparse else "",
        "matrices only" if case.dims == (2,) else "",
    ]
    path = next(of_group.path for of_group in wrapped.paths() if of_group.path != "plain")
    return f"| {case.name} | {path} | yes | {'; '.join(filter(None, remarks))} |"


def page() -> str:
    found = cases()
    holds = sum(case.refused is None for case in found)
    return HEAD.format(holds=holds, other=len(found) - holds) + "\n".join(map(row, found)) + "\n"


if __name__ == "__main__":
    (DOCS / "optimizers.md").write_text(page())

"""Writes optimizers.md: every optimizer of the conformance test, the path it takes, and whether the rule holds.

python docs/make_optimizer_table.py            (needs the test extra: the optimizers themselves)
"""

import sys
import textwrap
import warnings
from importlib.metadata import version
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from test_conformance import LAM, make_groups  # noqa: E402
from zoo import Case, cases  # noqa: E402

from cwd_wrap import CautiousDecay  # noqa: E402

PACKAGES = ["torch", "timm", "torch_optimizer", "pytorch_optimizer", "lion-pytorch", "prodigyopt", "dadaptation"]
PACKAGES += ["schedulefree", "torch-optimi", "rose-opt", "heavyball"]

HEAD = """# Which optimizer

**{holds} optimizers work**, {given} of them with an option; {other} do not, or cannot be run here. The table gives
the reason for each of these.

[A test](../tests/test_conformance.py) checks each step of each optimizer. It computes the optimizer's own step without
decay, adds the cautious decay in float64, and compares. The wrapped result must be the same up to one rounding (up to
four where the decay comes before the step).

- **path**: [one_pass and direction](how_it_works.md#four-paths) need no memory, pieces needs 64 MiB or the largest
  tensor, snapshot needs a copy of the decaying weights.
  The table has the path for the default options on the CPU with numba. `foreach=True`, `foreach=False` and
  `fused=False` turn one_pass into direction or pieces, and so do some other options, such as `capturable` in NAdam and
  `caution` in timm's optimizers. `opt.paths()` shows yours.
- **works**: whether the test above passes. *needs an option*: with the default options the step size of the decay is
  not one number, and the wrapper raises an error, which names the option. So do the remarks.
- **eta** is the factor by which the optimizer multiplies its own decay, [measured](../tests/test_own_decay.py). It is
  `lr` unless the remarks name another one.
- **weak**: the optimizer undoes part of the decay, because it averages with weights that it stored: those named.
{versions}

`python docs/make_optimizer_table.py` writes this page.

## The table

| optimizer | path | works | remarks |
|---|---|---|---|
"""


def wrapped(case: Case, step_size: float | None) -> CautiousDecay:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CautiousDecay(
            case.build(make_groups(case, LAM)),
            None if case.decay_key else LAM,
            step_size=None if step_size is None else lambda _: step_size,
        )


def option(case: Case) -> str:
    """What the error asks for: the part after its last colon."""
    try:
        wrapped(case, None)
    except ValueError as error:
        asked = str(error).rpartition(": ")[2].removesuffix(", a function of the group that returns it")
        asked = asked.removeprefix("give the group weight_decay=0, or ").replace("give the group", "give it")
        asked = asked.replace(", or pass step_size", ", or step_size")
        return asked.replace("wd_ratio=1", "`wd_ratio=1`").replace("step_size=", "`step_size=`")
    raise AssertionError(case.name)


def row(case: Case) -> str:
    if case.refused:
        return f"| {case.name} | - | no | {case.refused} |"
    given = case.eta == "given"
    remarks = [
        option(case) if given else f"eta: `{case.eta}`" if case.eta != "lr" else "",
        "no `weight_decay` of its own: pass `lam=`" if not case.decay_key else "",
        f"has a second decay, `{case.decays}`, which stays" if case.decays and "1d" not in case.decays else "",
        "`weight_decay_1d` is switched off with it" if case.decays and "1d" in case.decays else "",
        "keeps its trust ratio in groups that decay" if case.adapts is not None else "",
        f"weak: {case.fades}" if case.fades else "",
        "schedule-free: the decay enters its step at y; CautiousDecay only" if case.averages else "",
        "`step` needs a closure" if case.closure else "",
        "gradients need a graph" if case.create_graph else "",
        "only rows in the sparse gradient decay" if case.sparse else "",
        "matrices in groups with `use_muon=True`, all others with `use_muon=False`" if case.use_muon else "",
        "matrices only" if case.dims == (2,) and not case.use_muon else "",
    ]
    paths = wrapped(case, 1.0 if given else None).paths()
    path = next(of_group.path for of_group in paths if of_group.path != "plain")
    return f"| {case.name} | {path} | {'needs an option' if given else 'yes'} | {'; '.join(filter(None, remarks))} |"


def page() -> str:
    found = cases()
    holding = [case for case in found if case.refused is None]
    given = sum(case.eta == "given" for case in holding)
    versions = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in PACKAGES)
    versions = textwrap.fill(f"- Versions: {versions}.", 120, subsequent_indent="  ", break_on_hyphens=False)
    head = HEAD.format(holds=len(holding), given=given, other=len(found) - len(holding), versions=versions)
    return head + "\n".join(map(row, found)) + "\n"


if __name__ == "__main__":
    (DOCS / "optimizers.md").write_text(page())

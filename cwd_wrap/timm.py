"""timm by name: ``import cwd_wrap.timm``, and every optimizer that timm knows is there as ``cautious_<name>`` too.

    import cwd_wrap.timm
    optimizer = timm.optim.create_optimizer_v2(model, "cautious_adamw", lr=1e-3, weight_decay=0.05)

A training script that knows nothing of this is run, unchanged, by

    python -m cwd_wrap.timm train.py --opt cautious_adamw ...

The decay is each group's own ``weight_decay``, as timm's group builders set it, so biases and norms stay out. Not to be
confused with timm's own ``cadamw`` and the like: those mask the update (arXiv 2411.16085), not the decay.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import runpy
import sys
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from torch.optim import Optimizer

from cwd_wrap.wrappers import CautiousDecay

# timm is imported in `register` only: as a launcher, this file must let a timm in the script's folder go first.
if TYPE_CHECKING:
    from timm.optim._optim_factory import OptimInfo

_Registry: Any = object  # `register` puts timm's own class behind

PREFIX = "cautious_"

_OPTIONS = [p.name for p in inspect.signature(CautiousDecay).parameters.values() if p.kind is p.KEYWORD_ONLY]


class CautiousNames(_Registry):  # type: ignore[misc]
    """What `register` puts before timm's registry: names with ``cautious_``, made from the others when asked for."""

    plain_class: Any
    """The registry's class without this."""

    def list_optimizers(self, *args: Any, **kwargs: Any) -> Any:
        """All names, those with ``cautious_`` among them; arguments as in timm."""
        everything = self.plain_class()
        for name in super().list_optimizers():
            info = super().get_optimizer_info(name)
            everything.register(dataclasses.replace(info, name=name))  # an alias's entry has its target's name
            everything.register(_cautious(info, name))
        return everything.list_optimizers(*args, **kwargs)

    def get_optimizer_info(self, name: str) -> "OptimInfo":
        """The entry of ``name``; timm's own error for ``cautious_`` of a name that it does not know."""
        base = name.lower().removeprefix(PREFIX)
        info: OptimInfo = super().get_optimizer_info(base)
        return info if base == name.lower() else _cautious(info, base)

    def get_optimizer_class(self, name_or_info: "str | OptimInfo", bind_defaults: bool = True) -> Any:
        """The class of ``name_or_info``, params first, its defaults bound if asked for."""
        info = self.get_optimizer_info(name_or_info) if isinstance(name_or_info, str) else name_or_info
        if isinstance(info.opt_class, str) and info.name.startswith(PREFIX):  # apex, bitsandbytes: imported on demand
            info = dataclasses.replace(info, opt_class=_over(super().get_optimizer_class(info, bind_defaults=False)))
        return super().get_optimizer_class(info, bind_defaults)

    def create_optimizer(self, model_or_params: Any, opt: str, *args: Any, **kwargs: Any) -> Optimizer:
        """timm's own, for all names; one with ``cautious_`` takes the keyword-only arguments of `CautiousDecay` too."""
        optimizer: Optimizer
        lookahead = "lookahead_" if opt.lower().startswith("lookahead_") else ""
        name = opt.lower().removeprefix(lookahead)
        if "cautious" not in name.split("_")[:-1]:
            optimizer = super().create_optimizer(model_or_params, opt, *args, **kwargs)
            return optimizer
        info = self.get_optimizer_info(name)
        options = {option: kwargs.pop(option) for option in _OPTIONS if option in kwargs}
        # timm takes what stands before the last "_" for prefixes and drops those it does not know: ask by a bare name.
        only_one = self.plain_class()
        try:
            base = super().get_optimizer_class(name.removeprefix(PREFIX), bind_defaults=False)
            only_one.register(dataclasses.replace(info, name="cautious", opt_class=_over(base, **options)))
            optimizer = only_one.create_optimizer(model_or_params, f"{lookahead}cautious", *args, **kwargs)
        except (AssertionError, ImportError, ValueError) as error:
            msg = f"{opt}: {error}"
            raise ValueError(msg) from error
        return optimizer


def register() -> None:
    """Teach timm's registry the names; done on import. Done twice, it changes nothing."""
    try:
        registry = importlib.import_module("timm.optim._optim_factory").default_registry
    except ImportError as error:
        try:
            found = f"timm {importlib.metadata.version('timm')}"
        except importlib.metadata.PackageNotFoundError:
            found = "no timm"
        msg = (
            "cwd_wrap.timm needs timm 1.0.12 or newer, the first with a registry of optimizers, but found "
            f"{found} ({error}): pip install 'timm>=1.0.12'"
        )
        raise ImportError(msg) from error
    plain = getattr(registry, "plain_class", type(registry))
    registry.__class__ = type(f"Cautious{plain.__name__}", (CautiousNames, plain), {"plain_class": plain})


def _cautious(info: "OptimInfo", name: str) -> "OptimInfo":
    """The entry of ``cautious_<name>``, from that of ``name``."""
    its_own = " with cautious update (arXiv 2411.16085)" if (info.defaults or {}).get("caution") else ""
    return dataclasses.replace(
        info,
        name=PREFIX + name,
        opt_class=info.opt_class if isinstance(info.opt_class, str) else _over(info.opt_class),
        description=f"Cautious weight decay (arXiv 2510.12402) over {name}{its_own}: {info.description}",
    )


def _over(base: Any, **options: Any) -> Any:
    """``base`` wrapped: a class if it is one, else, as timm allows, a function of params."""
    if isinstance(base, type):
        return CautiousDecay.over(base, **options)
    return functools.partial(_build, base, options)


def _build(base: Any, options: dict[str, Any], params: Any, **kwargs: Any) -> CautiousDecay:
    return CautiousDecay(base(params, **kwargs), **options)


def run_script(argv: list[str]) -> None:
    """Run the script ``argv[0]`` with the names registered, as ``python argv[0] ...`` would run it without."""
    usage = "usage: python -m cwd_wrap.timm SCRIPT [its arguments], such as train.py --opt cautious_adamw"
    if argv[:1] in (["-h"], ["--help"]):
        print(usage)  # noqa: T201
        return
    if not argv:
        _stop(f"no script given\n{usage}")
    script = Path(argv[0])
    if not script.is_file():
        _stop(f"there is no script {argv[0]!r} in {Path.cwd()}\n{usage}")
    sys.argv = argv
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(script.resolve().parent)
    try:
        importlib.import_module("cwd_wrap.timm")  # registers; this run of the file is called __main__ and makes way
    except ImportError as error:
        _stop(str(error))
    sys.excepthook = _show_from_script
    main = ModuleType("__main__")
    main.__file__ = str(script.absolute())
    sys.modules["__main__"] = main
    # runpy.run_path is not it: it sets sys.argv[0] to the full path, and takes __main__ away before threads and exit
    # handlers have ended.
    exec(compile(script.read_bytes(), main.__file__, "exec"), vars(main))  # noqa: S102


def _stop(message: str) -> NoReturn:
    """Exit as python does for a script that it cannot open."""
    print(f"python -m cwd_wrap.timm: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(2)


def _show_from_script(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Show the traceback as it were without a launcher: from the script on."""
    launcher = (run_script.__code__.co_filename, "<frozen runpy>", runpy.__file__)  # runpy: python -m
    while traceback is not None and traceback.tb_frame.f_code.co_filename in launcher:
        traceback = traceback.tb_next
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)


if __name__ == "__main__":
    run_script(sys.argv[1:])
else:
    register()

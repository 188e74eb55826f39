"""Names for timm: after ``import cwd_wrap.timm``, every optimizer of timm also exists as ``cautious_<name>``.

    import cwd_wrap.timm
    optimizer = timm.optim.create_optimizer_v2(model, "cautious_adamw", lr=1e-3, weight_decay=0.05)

A training script without this import runs unchanged with

    python -m cwd_wrap.timm train.py --opt cautious_adamw ...
    python -m cwd_wrap.timm -m open_clip_train.main --opt timm/cautious_adamw ...

Processes that multiprocessing starts after the import, or under the launcher, have the names too. The decay is each
group's own ``weight_decay``, as timm's group builders set it, so biases and norms stay out. timm's own ``cadamw`` and
the like are another method: they mask the update (arXiv 2411.16085), not the decay.
"""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import multiprocessing
import runpy
import sys
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from torch.optim import Optimizer

from cwd_wrap.methods import CautiousDecay

# timm is imported in `register` only: under the launcher, a timm in the script's folder takes precedence.
if TYPE_CHECKING:
    from timm.optim._optim_factory import OptimInfo

_Registry: Any = object  # `register` makes a subclass of `CautiousNames` and timm's own class

PREFIX = "cautious_"
LOOKAHEAD = "lookahead_"


class CautiousNames(_Registry):  # type: ignore[misc]
    """What `register` adds to timm's registry: names with ``cautious_``, made from the others on request."""

    plain_class: Any
    """timm's own class of the registry."""

    def list_optimizers(self, *args: Any, **kwargs: Any) -> Any:
        """All names, with and without ``cautious_``; arguments as in timm."""
        everything = self.plain_class()
        for name in super().list_optimizers():
            info = super().get_optimizer_info(name)
            everything.register(dataclasses.replace(info, name=name))  # the entry of an alias has its target's name
            everything.register(_cautious(info, name))
        return everything.list_optimizers(*args, **kwargs)

    def get_optimizer_info(self, name: str) -> "OptimInfo":
        """The entry of ``name``, with or without ``cautious_``. An unknown name raises timm's own error."""
        base = name.lower().removeprefix(PREFIX)
        if base != name.lower() and base.startswith(LOOKAHEAD):
            swapped = base.replace(LOOKAHEAD, LOOKAHEAD + PREFIX, 1)
            msg = f"{PREFIX}{base}: Lookahead goes around the cautious optimizer, not inside it: use {swapped}"
            raise ValueError(msg)
        info: OptimInfo = super().get_optimizer_info(base)
        return info if base == name.lower() else _cautious(info, base)

    def get_optimizer_class(self, name_or_info: "str | OptimInfo", bind_defaults: bool = True) -> Any:
        """The class of ``name_or_info``, built from parameters; with timm's defaults if ``bind_defaults``."""
        info = self.get_optimizer_info(name_or_info) if isinstance(name_or_info, str) else name_or_info
        if isinstance(info.opt_class, str) and info.name.startswith(PREFIX):  # apex, bitsandbytes: imported on demand
            base = super().get_optimizer_class(info, bind_defaults=False)
            info = dataclasses.replace(info, opt_class=CautiousDecay.over(base))
        return super().get_optimizer_class(info, bind_defaults)

    def create_optimizer(self, model_or_params: Any, opt: str, *args: Any, **kwargs: Any) -> Optimizer:
        """Like timm's. A name with ``cautious_`` also takes the keyword arguments of `CautiousDecay`.

        ``lam`` takes the place of ``weight_decay``, so biases and norms stay out of it, too.
        """
        optimizer: Optimizer
        lookahead = LOOKAHEAD if opt.lower().startswith(LOOKAHEAD) else ""
        name = opt.lower().removeprefix(lookahead)
        if "cautious" not in name.split("_")[:-1]:
            optimizer = super().create_optimizer(model_or_params, opt, *args, **kwargs)
            return optimizer
        info = self.get_optimizer_info(name)
        # timm treats everything before the last "_" as prefixes and drops unknown ones: use a name without "_".
        only_one = self.plain_class()
        try:
            base = super().get_optimizer_class(name.removeprefix(PREFIX), bind_defaults=False)
            only_one.register(dataclasses.replace(info, name="cautious", opt_class=CautiousDecay.over(base)))
            called = inspect.signature(only_one.create_optimizer).bind(model_or_params, "", *args, **kwargs)
            called.arguments["opt"] = f"{lookahead}cautious"
            if kwargs.get("lam") is not None:
                called.arguments["weight_decay"] = kwargs["lam"]
            optimizer = only_one.create_optimizer(*called.args, **called.kwargs)
        except (AssertionError, ImportError, ValueError) as error:
            msg = f"{opt}: {error}"
            raise ValueError(msg) from error
        return optimizer


def register() -> None:
    """Add the names to timm's registry. Runs on import; a second call changes nothing."""
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
    # Child processes inherit this dict. Where it is pickled (spawn, forkserver), unpickling the function imports this
    # module in the child, after the child has the parent's sys.path and main module, and before it runs its target.
    multiprocessing.current_process()._config[__name__] = register  # type: ignore[attr-defined]  # noqa: SLF001


def _cautious(info: "OptimInfo", name: str) -> "OptimInfo":
    """The entry of ``cautious_<name>``, from that of ``name``."""
    its_own = " with cautious update (arXiv 2411.16085)" if (info.defaults or {}).get("caution") else ""
    return dataclasses.replace(
        info,
        name=PREFIX + name,
        opt_class=info.opt_class if isinstance(info.opt_class, str) else CautiousDecay.over(info.opt_class),
        description=f"Cautious weight decay (arXiv 2510.12402) over {name}{its_own}: {info.description}",
    )


def run_script(argv: list[str]) -> None:
    """Run ``python argv...``, a script or ``-m`` and a module with its arguments, with the names registered."""
    usage = (
        "usage: python -m cwd_wrap.timm SCRIPT [its arguments], such as train.py --opt cautious_adamw\n"
        "       python -m cwd_wrap.timm -m MODULE [its arguments], as python -m MODULE"
    )
    if argv[:1] in (["-h"], ["--help"]):
        print(usage)  # noqa: T201
        return
    as_module = argv[:1] == ["-m"]
    argv = argv[as_module:]
    if not argv:
        _stop(f"no {'module' if as_module else 'script'} given\n{usage}")
    script = Path(argv[0])
    if not as_module and not script.is_file():
        _stop(f"there is no script {argv[0]!r} in {Path.cwd()}\n{usage}")
    if not as_module and not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(script.resolve().parent)
    try:
        importlib.import_module("cwd_wrap.timm")  # registers; this copy of the file is __main__, and replaced below
    except ImportError as error:
        _stop(str(error))
    main = ModuleType("__main__")
    if as_module:
        main.__spec__ = spec = _spec_of(argv[0])
        main.__loader__, main.__package__, main.__file__ = spec.loader, spec.parent, spec.origin
        code = spec.loader.get_code(spec.name)
        argv = [spec.origin, *argv[1:]]
    else:
        main.__file__ = str(script.absolute())
        code = compile(script.read_bytes(), main.__file__, "exec")
    sys.argv = argv
    sys.excepthook = _show_from_script
    sys.modules["__main__"] = main
    # Not runpy's functions: run_path sets sys.argv[0] to the full path, and both remove __main__ before threads and
    # exit handlers have ended.
    exec(code, vars(main))  # noqa: S102


def _spec_of(name: str) -> Any:
    """The spec of a module, or of ``__main__`` in a package, as ``python -m`` finds it."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError) as error:
        _stop(f"cannot import module {name!r} ({error})")
    if spec is None or spec.origin is None:
        _stop(f"there is no module {name!r} that can be run")
    return spec


def _stop(message: str) -> NoReturn:
    """Exit with a message and python's exit code for a script that it cannot open."""
    print(f"python -m cwd_wrap.timm: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(2)


def _show_from_script(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Show the traceback without the launcher's own frames."""
    launcher = (run_script.__code__.co_filename, "<frozen runpy>", runpy.__file__)  # runpy: python -m
    while traceback is not None and traceback.tb_frame.f_code.co_filename in launcher:
        traceback = traceback.tb_next
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)


if __name__ == "__main__":
    run_script(sys.argv[1:])
else:
    register()

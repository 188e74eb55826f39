"""Optimizers that tools build from a configuration: each snippet of docs/clients.md, read by its tool.

Tools that the test libraries do not include are tested where they are installed, and in any case by a stand-in that
calls in the same way.
"""

import ast
import copy
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import net
from torch import nn
from torch.optim import AdamW, Optimizer

from cwd_wrap import CautiousDecay, optim

PAGE = Path(__file__).parents[1] / "docs/clients.md"
OTHER = "Optimizers of other libraries"


def snippet(heading: str, language: str) -> str:
    """The first block of that language below a heading of the page."""
    below = re.split(rf"^### {re.escape(heading)}$", PAGE.read_text(), flags=re.MULTILINE)[1]
    found = re.search(rf"^```{language}\n(.*?)^```", below, flags=re.DOTALL | re.MULTILINE)
    assert found is not None, heading
    return found[1]


def config(heading: str) -> dict[str, Any]:
    """The one entry of the YAML block below a heading."""
    yaml = pytest.importorskip("yaml")
    (entry,) = yaml.safe_load(snippet(heading, "yaml")).values()
    assert isinstance(entry, dict)
    return entry


def is_as_on_the_page(optimizer: Any, lr: float) -> bool:
    """Is it the class of the page, with the page's lr, lam and mask?"""
    group = optimizer.param_groups[0]
    found = type(optimizer), group["lr"], group["weight_decay"], getattr(optimizer, "mask", None)
    return (optim.AdamW, lr, 0.1, "update") == found


def by_import(path: str) -> Any:
    """What has this dotted name, as most tools find it."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_check_of_the_class_can_fail() -> None:
    """Plain AdamW is not what the page builds."""
    assert not is_as_on_the_page(AdamW(net().parameters(), lr=0.1, weight_decay=0.1), 0.1)


# ------------------------------------------------------------------------------------ Hydra


@pytest.mark.parametrize("given", ["partial", "positional", "params"])
def test_hydra(given: str) -> None:
    """Hydra builds the class with `_partial_`, with positional parameters and with `params=`."""
    instantiate = pytest.importorskip("hydra.utils").instantiate
    cfg, p = config("Hydra"), net().parameters()
    whole = {key: value for key, value in cfg.items() if key != "_partial_"}
    optimizer = {
        "partial": lambda: instantiate(cfg)(p),
        "positional": lambda: instantiate(whole, p),
        "params": lambda: instantiate(whole, params=p),
    }[given]()

    assert is_as_on_the_page(optimizer, 0.001)


def test_hydra_takes_groups() -> None:
    """With `_partial_`, param groups are passed on as they are."""
    instantiate = pytest.importorskip("hydra.utils").instantiate
    p = list(net().parameters())
    optimizer = instantiate(config("Hydra"))([{"params": p[:2]}, {"params": p[2:], "weight_decay": 0.0}])

    assert [0.1, 0.0] == [group["weight_decay"] for group in optimizer.param_groups]


@pytest.mark.parametrize("base", ["timm.optim.Lion", "torch.optim.NAdam"])
def test_hydra_builds_an_optimizer_of_another_library(base: str) -> None:
    """`_target_: cwd_wrap.optim.cautious` takes the optimizer as `base`."""
    instantiate = pytest.importorskip("hydra.utils").instantiate
    pytest.importorskip(base.rpartition(".")[0])
    optimizer = instantiate({**config(OTHER), "base": base}, net().parameters())

    assert (base.rpartition(".")[2], True) == (type(optimizer.base_optimizer).__name__, optimizer.strict)
    assert (0.0001, 1.0) == tuple(optimizer.param_groups[0][key] for key in ("lr", "weight_decay"))


# ------------------------------------------------------------------------------------ jsonargparse, Lightning, LitGPT

CLASS_PATH = "LightningCLI, jsonargparse and LitGPT"


def parser() -> Any:
    """A parser for a function that takes parameters and returns an optimizer."""
    made = pytest.importorskip("jsonargparse").ArgumentParser(exit_on_error=False)
    made.add_argument("--optimizer", type=Callable[[Iterable[Any]], Optimizer])
    return made


@pytest.mark.filterwarnings("ignore")  # newer versions call instantiate_classes instantiate
def test_jsonargparse() -> None:
    """A parser for functions that return an optimizer takes the class, and knows the options of both."""
    cfg = parser().parse_object({"optimizer": config(CLASS_PATH)})
    optimizer = parser().instantiate_classes(cfg).optimizer(net().parameters())

    assert is_as_on_the_page(optimizer, 0.01)
    assert "class_path: cwd_wrap.optim.AdamW" in parser().dump(cfg)


def test_jsonargparse_knows_the_types_of_both() -> None:
    """A wrong type and an unknown option are refused before anything is built."""
    jsonargparse = pytest.importorskip("jsonargparse")
    for words in (["strict=maybe"], ["lr=fast"], ["nonsense=1"]):
        with pytest.raises(jsonargparse.ArgumentError, match=words[0].split("=")[0]):
            parser().parse_args(["--optimizer=cwd_wrap.optim.AdamW", f"--optimizer.{words[0]}"])


def lightning_cli(*words: object) -> Any:
    """The optimizer of a Trainer that LightningCLI builds from these words, and fits for a step."""
    lightning = pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI
    from torch.utils.data import DataLoader

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch).square().mean()

        def train_dataloader(self) -> Any:
            return DataLoader(torch.ones(2, 3), batch_size=2)

    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    quiet |= {"max_epochs": 1, "enable_model_summary": False}
    cli = LightningCLI(Module, save_config_callback=None, trainer_defaults=quiet, args=["fit", *map(str, words)])
    return cli.trainer.optimizers[0]


@pytest.mark.filterwarnings("ignore")
def test_lightning_cli(tmp_path: Path) -> None:
    """LightningCLI takes the class from a file and on the command line, with options of both."""
    path = tmp_path / "config.yaml"
    path.write_text(snippet(CLASS_PATH, "yaml"))
    (words,) = re.findall(r"`(--optimizer [^`]*)`", PAGE.read_text())
    from_words = lightning_cli(*words.split(), "--optimizer.weight_decay=0.3", "--optimizer.strict=true")

    group = from_words.param_groups[0]

    assert is_as_on_the_page(lightning_cli("--config", path), 0.01)
    assert (optim.AdamW, True) == (type(from_words), from_words.strict)
    assert (0.01, 0.3) == (group["lr"], group["weight_decay"])


@pytest.mark.filterwarnings("ignore")
def test_lightning_cli_refuses_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    """LightningCLI would drop the options of `cautious`, so it must not take it for a class."""
    with pytest.raises(SystemExit):
        lightning_cli("--optimizer=cwd_wrap.optim.cautious", "--optimizer.base=AdamW")

    assert 'Parser key "optimizer"' in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_lightning_cli_takes_a_class_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's class over an optimizer of another library is taken by its name."""
    pytest.importorskip("timm")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    (source,) = (block for block in blocks if "class CautiousLion(" in block)
    mine: Any = ModuleType("optimizers_of_mine")
    exec(source, vars(mine))
    monkeypatch.setitem(sys.modules, mine.__name__, mine)
    optimizer = lightning_cli(f"--optimizer={mine.__name__}.CautiousLion", "--optimizer.weight_decay=0.3")

    assert (mine.CautiousLion, 0.3) == (type(optimizer), optimizer.param_groups[0]["weight_decay"])


def like_litgpt(cfg: dict[str, Any], params: Any, **more: Any) -> Any:
    """Passes ``more`` only as far as the signature has it, then positional parameters and keywords."""
    cls = by_import(cfg["class_path"])
    more = {key: value for key, value in more.items() if key in inspect.signature(cls).parameters}
    return cls(params, **cfg["init_args"], **more)


def litgpt(cfg: dict[str, Any], params: Any, **more: Any) -> Any:
    return pytest.importorskip("litgpt.utils").instantiate_torch_optimizer(cfg, params, **more)


@pytest.mark.parametrize("instantiate", [like_litgpt, litgpt])
def test_litgpt(instantiate: Callable[..., Any]) -> None:
    """LitGPT finds `fused` in the signature, so the class gets it as AdamW would."""
    optimizer = instantiate(config(CLASS_PATH), net().parameters(), fused=True, unknown=1)

    assert is_as_on_the_page(optimizer, 0.01)
    assert optimizer.defaults["fused"]


# ------------------------------------------------------------------------------------ torchtune, MMEngine


def like_torchtune(cfg: dict[str, Any], *args: Any) -> Any:
    """Walks from the first package through attributes, and imports what is none."""
    first, *rest = cfg.pop("_component_").split(".")
    found: Any = importlib.import_module(first)
    path = first
    for part in rest:
        path += f".{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
    return found(*args, **cfg)


def torchtune(cfg: dict[str, Any], *args: Any) -> Any:
    tool = pytest.importorskip("torchtune.config", exc_type=ImportError)
    return tool.instantiate(pytest.importorskip("omegaconf").OmegaConf.create(cfg), *args)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("instantiate", [like_torchtune, torchtune])
def test_torchtune(instantiate: Callable[..., Any]) -> None:
    """`_component_` names the class, or `cautious`."""
    cautious = {**config(OTHER), "base": "torch.optim.NAdam"}
    cautious["_component_"] = cautious.pop("_target_")

    assert is_as_on_the_page(instantiate(config("torchtune"), net().parameters()), 0.0003)
    assert instantiate(cautious, net().parameters()).strict


def like_mmengine(model: nn.Module, cfg: dict[str, Any]) -> Any:
    """Passes all by keyword: ``params``, with a group for each parameter if ``paramwise_cfg`` is there."""
    arguments = copy.deepcopy(cfg["optimizer"])
    cls = by_import(arguments.pop("type"))
    assert inspect.isclass(cls) or inspect.isfunction(cls)
    no_decay = {"weight_decay": 0.0}
    groups = [{"params": [p], **(no_decay if name.endswith("bias") else {})} for name, p in model.named_parameters()]
    return cls(params=groups if "paramwise_cfg" in cfg else model.parameters(), **arguments)


def mmengine(model: nn.Module, cfg: dict[str, Any]) -> Any:
    return pytest.importorskip("mmengine.optim").build_optim_wrapper(model, cfg).optimizer


@pytest.mark.parametrize("build", [like_mmengine, mmengine])
def test_mmengine(build: Callable[..., Any]) -> None:
    """MMEngine's builder finds the class by its dotted name, with groups of its own or without, and `cautious`."""
    namespace: dict[str, Any] = {}
    exec(snippet("MMEngine", "python"), namespace)
    cfg = namespace["optim_wrapper"]
    in_groups = build(net(), cfg)
    cautious = {**config(OTHER), "base": "torch.optim.NAdam"}
    cautious["type"] = cautious.pop("_target_")

    assert is_as_on_the_page(build(net(), {"optimizer": cfg["optimizer"]}), 0.001)
    assert is_as_on_the_page(in_groups, 0.001)
    assert [0.1, 0.0, 0.1, 0.0] == [group["weight_decay"] for group in in_groups.param_groups]
    assert build(net(), {"optimizer": cautious}).strict


# ------------------------------------------------------------------------------------ tools that import a name


def like_verl(cfg: dict[str, Any], params: Any) -> Any:
    """Joins the arguments that it knows with those of ``override_optimizer_config``."""
    arguments = {key: cfg[key] for key in ("lr", "weight_decay")} | {"betas": tuple(cfg["betas"])}
    cls = getattr(importlib.import_module(cfg["optimizer_impl"]), cfg["optimizer"])
    return cls(params, **arguments, **cfg["override_optimizer_config"])


def like_nemo_rl(cfg: dict[str, Any], params: Any) -> Any:
    return by_import(cfg["name"])(params, **cfg["kwargs"])


def like_sd_scripts(command: str, params: Any) -> tuple[Any, str]:
    """Each word of ``--optimizer_args`` is ``key=value``, a Python literal; the log has the class's ``__name__``."""
    words = shlex.split(command.replace("\\\n", ""))
    start = words.index("--optimizer_args") + 1
    pairs = [word.split("=") for word in words[start:] if "=" in word]
    cls = by_import(words[words.index("--optimizer_type") + 1])
    lr = float(words[words.index("--learning_rate") + 1])
    made = cls(params, lr=lr, **{key: ast.literal_eval(value) for key, value in pairs})
    return made, f"{cls.__module__}.{cls.__name__}"


def test_verl_and_nemo_rl() -> None:
    """Tools that import a class by name and call it with parameters and keywords."""
    assert is_as_on_the_page(like_verl(config("verl"), net().parameters()), 1e-5)
    assert is_as_on_the_page(like_nemo_rl(config("NeMo RL"), net().parameters()), 1e-5)


def test_sd_scripts() -> None:
    """The command's arguments are literals, and the name in the log can be imported."""
    optimizer, logged = like_sd_scripts(snippet("kohya's sd-scripts", "bash"), net().parameters())

    assert is_as_on_the_page(optimizer, 1e-4)
    assert by_import(logged) is type(optimizer)


def test_sd_scripts_with_another_library() -> None:
    """`cautious` is called in the same way as a class."""
    command = (
        "train.py --learning_rate 0.1 --optimizer_type cwd_wrap.optim.cautious "
        "--optimizer_args \"base='torch.optim.NAdam'\" weight_decay=0.1"
    )
    optimizer, logged = like_sd_scripts(command, net().parameters())

    assert isinstance(optimizer, CautiousDecay)
    assert by_import(logged) is optim.cautious

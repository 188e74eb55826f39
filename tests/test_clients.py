"""The clients that build, step, save and load optimizers, each in its own library.

Training through a client gives the weights of a plain loop, or of an uninterrupted run, bit for bit.
"""

import copy
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PathOptions, loss_of, net, same, train, values
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from cwd_wrap import CautiousDecay, MaskMonitor, optim

ROOT = Path(__file__).parents[1]
CautiousAdamW = CautiousDecay.over(AdamW)
CHOSEN = PathOptions()  # the library chooses the path


def adamw(model: nn.Module, path: PathOptions) -> CautiousDecay:
    return CautiousDecay(AdamW(model.parameters(), lr=0.05, weight_decay=0.5, **path.base), **path)


# ------------------------------------------------------------------------- Hugging Face Trainer


def language_model() -> nn.Module:
    """The same tiny model at each call."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
        )
    )


def trainer(model: nn.Module, folder: Path, optimizer: Any = None, **kwargs: Any) -> Any:
    """A Trainer of six steps that saves after the third; further arguments go to TrainingArguments."""
    import transformers

    ids = [(torch.arange(8) * k) % 16 for k in range(24)]
    flags = {"optimizers": (optimizer, None)} if optimizer is not None else {}
    if "cls" in kwargs:
        flags["optimizer_cls_and_kwargs"] = kwargs.pop("cls")
    of = kwargs.pop("of", transformers.Trainer)
    options = {
        "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.05, "weight_decay": 0.5,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "steps", "logging_strategy": "no",
    }  # fmt: skip
    args = transformers.TrainingArguments(str(folder), **(options | kwargs))
    return of(model, args, train_dataset=[{"input_ids": x, "labels": x} for x in ids], **flags)


def page_class(page: str, name: str) -> Any:
    """The class of that name in a page of docs/."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)
    (source,) = (block for block in blocks if f"class {name}(" in block)
    for package in re.findall(r"^# needs (\w+)", source, flags=re.MULTILINE):
        pytest.importorskip(package)
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return namespace[name]


def inner(optimizer: Any) -> CautiousDecay:
    """The wrapper inside the client's own optimizer object."""
    while not isinstance(optimizer, CautiousDecay):
        optimizer = optimizer.optimizer
    return optimizer


class Rates:
    """A callback of the Trainer that notes each step's learning rates, of all groups."""

    def __new__(cls) -> Any:
        from transformers import TrainerCallback

        class Noting(TrainerCallback):
            rates: list[list[float]] = []  # noqa: RUF012

            def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
                self.rates.append([group["lr"] for group in optimizer.param_groups])

        return type("Noting", (Noting,), {"rates": []})()


def options_of(optimizer: Any) -> list[dict[str, Any]]:
    """All that the groups hold but the parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def trained(client: Any, **kwargs: Any) -> tuple[Any, Tensor, list[list[float]]]:
    """The Trainer's optimizer, the weights, and each step's learning rates."""
    client.add_callback(noting := Rates())
    client.train(**kwargs)
    return client.optimizer.optimizer, values(client.model), noting.rates


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch", "adagrad"])
def test_the_trainer_of_the_page_keeps_what_the_arguments_say(tmp_path: Path, name: str) -> None:
    """The page's Trainer has the plain one's optimizer inside, with its groups, options and learning rates."""
    options = {"optim": name, "warmup_steps": 2, "lr_scheduler_type": "cosine", "adam_beta1": 0.8, "adam_epsilon": 1e-6}
    cls = page_class("clients.md", "CautiousTrainer")
    ours, weights, rates = trained(trainer(language_model(), tmp_path, of=cls, **options))
    plain, plain_weights, plain_rates = trained(trainer(language_model(), tmp_path, **options))

    assert (CautiousDecay, type(plain)) == (type(ours), type(ours.base_optimizer))
    assert options_of(plain) == options_of(ours)
    assert [0.5, 0.0] == [group["weight_decay"] for group in ours.param_groups]
    assert rates == plain_rates
    assert len(set(map(tuple, rates))) == 5  # the schedule
    assert not torch.equal(weights, plain_weights)


@pytest.mark.filterwarnings("ignore:.*nothing to decay")
def test_the_trainer_of_the_page_without_decay_is_the_plain_one(tmp_path: Path) -> None:
    """With weight_decay=0 the page's Trainer gives the plain one's weights, bit for bit."""
    cls = page_class("clients.md", "CautiousTrainer")
    _, weights, _ = trained(trainer(language_model(), tmp_path, of=cls, weight_decay=0.0))
    _, plain, _ = trained(trainer(language_model(), tmp_path, weight_decay=0.0))

    assert torch.equal(weights, plain)


def test_the_trainer_of_the_page_resumes(tmp_path: Path) -> None:
    """A resumed run has the learning rates and the weights of the uninterrupted run, bit for bit."""
    cls = page_class("clients.md", "CautiousTrainer")
    _, weights, rates = trained(trainer(language_model(), tmp_path, of=cls))
    client = trainer(language_model(), tmp_path, of=cls)
    _, resumed, later_rates = trained(client, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    assert rates[3:] == later_rates
    assert torch.equal(weights, resumed)


def test_the_trainer_of_the_page_takes_a_plain_checkpoint_and_trains_twice(tmp_path: Path) -> None:
    """It resumes from the plain Trainer's checkpoint, and a second call of train() keeps the one wrapper."""
    trainer(language_model(), tmp_path).train()
    client = trainer(language_model(), tmp_path, of=page_class("clients.md", "CautiousTrainer"))
    first, *_ = trained(client, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    second, *_ = trained(client)

    assert (first, AdamW) == (second, type(first.base_optimizer))


def test_a_class_for_the_trainer_needs_the_learning_rate(tmp_path: Path) -> None:
    """With lr the class trains at the Trainer's learning rate; without it at the class's own, 1e-3."""
    _, weights, _ = trained(trainer(language_model(), tmp_path, of=page_class("clients.md", "CautiousTrainer")))
    _, with_lr, rates = trained(trainer(language_model(), tmp_path, cls=(optim.AdamW, {"lr": 0.05, "fused": True})))
    _, _, without = trained(trainer(language_model(), tmp_path, cls=(optim.AdamW, {})))

    assert torch.equal(weights, with_lr)
    assert ([0.05, 0.05], [0.001, 0.001]) == (rates[0], without[0])


def test_the_trainer_has_no_name_for_it(tmp_path: Path) -> None:
    """`optim=` takes the names of transformers alone."""
    language_model()
    with pytest.raises(ValueError, match="cautious_adamw"):
        trainer(language_model(), tmp_path, optim="cautious_adamw")


def test_trainer_takes_the_class_and_resumes(tmp_path: Path, every_path: PathOptions) -> None:
    """`optimizer_cls_and_kwargs` keeps the Trainer's decay groups, and a resumed run equals the uninterrupted one."""
    cls = CautiousDecay.over(AdamW, **every_path)
    kwargs = {"cls": (cls, {"lr": 0.05, **every_path.base}), "bf16": every_path["path"] == "direction"}
    first = trainer(model := language_model(), tmp_path, **kwargs)
    first.train()
    second = trainer(again := language_model(), tmp_path, **kwargs)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    opt = inner(second.optimizer)

    assert type(opt) is cls
    assert [group["weight_decay"] for group in opt.param_groups] == [0.5, 0.0]
    assert opt.param_groups[0]["lr"] == 0.0  # the Trainer's schedule reached the base
    assert torch.equal(values(model), values(again))


def test_trainer_takes_an_instance(tmp_path: Path) -> None:
    """`optimizers=(optimizer, None)` trains as the class does, and differently from plain AdamW."""
    model, other = language_model(), language_model()
    by_class = trainer(model, tmp_path, cls=(CautiousAdamW, {"lr": 0.05}))
    decaying, rest = split(by_class, other)
    groups = [{"params": decaying, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}]
    by_class.train()
    trainer(other, tmp_path, CautiousDecay(AdamW(groups, lr=0.05))).train()
    trainer(plain := language_model(), tmp_path, cls=(AdamW, {"lr": 0.05})).train()

    assert torch.equal(values(model), values(other))
    assert not torch.equal(values(model), values(plain))


@pytest.mark.parametrize("again", [False, True], ids=["checkpoint's", "user's"])
def test_trainer_resumes_with_the_decay_of_the_checkpoint(tmp_path: Path, again: bool) -> None:
    """A run resumed with lam=1.5 goes on with the checkpoint's 0.5 and a warning, unless a callback sets it again."""
    transformers = pytest.importorskip("transformers")
    trainer(model := language_model(), tmp_path, CautiousDecay(AdamW(model.parameters(), lr=0.05), lam=0.5)).train()
    opt = CautiousDecay(AdamW((other := language_model()).parameters(), lr=0.05), lam=1.5)
    second = trainer(other, tmp_path, opt)

    class Again(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            opt.lam = 1.5

    if again:
        second.add_callback(Again())
    with pytest.warns(UserWarning, match=r"replaced lam=1.5 by weight_decay 0.5 of the checkpoint"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    assert opt.lam == (1.5 if again else 0.5)
    assert torch.equal(values(model), values(other)) is not again


def test_trainer_logs_a_monitor(tmp_path: Path) -> None:
    """The page's callback finds the Trainer's optimizer, and writes each row once when the Trainer logs."""
    client = trainer(language_model(), tmp_path, of=page_class("clients.md", "CautiousTrainer"))
    rows: list[dict[str, Any]] = []
    client.add_callback(page_class("diagnostics.md", "LogDecay")(MaskMonitor(), rows.append))
    client.args.logging_strategy, client.args.logging_steps = "steps", 2
    client.train()

    assert [1, 2, 3, 4, 5, 6] == [row["step"] for row in rows]
    assert {"transformer"} == {row["name"] for row in rows}


def split(of: Any, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The model's parameters that the Trainer decays, and the others."""
    names = set(of.get_decay_parameter_names(model))
    named = list(model.named_parameters())
    return [p for n, p in named if n in names], [p for n, p in named if n not in names]


# ------------------------------------------------------------------------------------ Lightning


def lightning_module(automatic: bool = True, path: PathOptions = CHOSEN) -> Any:
    """`net` as a LightningModule, with a scheduler; ``automatic=False`` steps by hand."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.automatic_optimization = automatic

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = loss_of(self.net, int(batch))
            if not automatic:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.lr_schedulers().step()
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = adamw(self, path)
            scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(range(6), batch_size=None)

    return Module()


def fit(module: Any, folder: Path, ckpt: Path | None = None, **kwargs: Any) -> Any:
    import lightning

    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"max_epochs": 1, "default_root_dir": folder, "enable_checkpointing": False}
    trainer = lightning.Trainer(**(options | kwargs))
    trainer.fit(module, ckpt_path=ckpt, weights_only=False)
    return trainer


def by_hand(steps: int, accumulate: int = 1, path: PathOptions = CHOSEN) -> Tensor:
    """The weights after the same training in a plain loop."""
    model = net()
    optimizer = adamw(model, path)
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    for step in range(steps):
        (loss_of(model, step % 6) / accumulate).backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return values(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_lightning_trains_as_a_plain_loop(tmp_path: Path, automatic: bool, every_path: PathOptions) -> None:
    """Lightning, with a scheduler and automatic or manual steps, gives the plain loop's weights."""
    module = lightning_module(automatic, every_path)
    fit(module, tmp_path)

    assert torch.equal(values(module.net), by_hand(6, path=every_path))


@pytest.mark.filterwarnings("ignore")
def test_lightning_logs_a_monitor(tmp_path: Path) -> None:
    """The page's callback finds Lightning's optimizer, and writes each group under its own key."""
    module, build = lightning_module(), CautiousDecay
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    first, _, last = module.net
    groups = [{"params": list(part.parameters())} for part in (first, last)]
    module.configure_optimizers = lambda: build(AdamW(groups, lr=0.05, weight_decay=0.5))
    written: list[tuple[int, str]] = []
    logger = loggers.CSVLogger(tmp_path)
    logger.log_metrics = lambda metrics, step=None: written.extend((step, key) for key in metrics)
    fit(module, tmp_path, logger=logger, callbacks=[page_class("diagnostics.md", "WatchDecay")(MaskMonitor())])
    keys = [f"net.{part}/share_decayed" for part in (0, 2)]

    assert {(step, key) for step in range(1, 7) for key in keys} <= set(written)
    assert len(written) == len(set(written))


@pytest.mark.filterwarnings("ignore")
def test_lightning_accumulates_gradients(tmp_path: Path) -> None:
    """Lightning with two batches per step gives the plain loop's weights."""
    module = lightning_module()
    fit(module, tmp_path, accumulate_grad_batches=2)

    assert torch.equal(values(module.net), by_hand(6, accumulate=2))


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_from_its_checkpoint(tmp_path: Path, every_path: PathOptions) -> None:
    """One epoch, a checkpoint and one more epoch give the weights of two epochs in one run."""
    first = fit(lightning_module(path=every_path), tmp_path)
    first.save_checkpoint(tmp_path / "last.ckpt")
    module = lightning_module(path=every_path)
    fit(module, tmp_path, ckpt=tmp_path / "last.ckpt", max_epochs=2)

    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["optimizer_states"][0]["state"]
    assert torch.equal(values(module.net), by_hand(12, path=every_path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("again", [False, True], ids=["checkpoint's", "user's"])
def test_lightning_resumes_with_the_decay_of_the_checkpoint(tmp_path: Path, again: bool) -> None:
    """A run resumed with lam=1.5 goes on with the checkpoint's 0.5 and a warning, unless a callback sets it again."""
    first = fit(lightning_module(), tmp_path)
    first.save_checkpoint(tmp_path / "last.ckpt")
    module = lightning_module()
    build = module.configure_optimizers
    module.configure_optimizers = lambda: set_lam(build())
    if again:
        module.on_train_start = lambda: set_lam({"optimizer": inner(module.optimizers())})
    with pytest.warns(UserWarning, match=r"replaced lam=1.5 by weight_decay 0.5 of the checkpoint"):
        fit(module, tmp_path, ckpt=tmp_path / "last.ckpt", max_epochs=2)

    assert inner(module.optimizers()).lam == (1.5 if again else 0.5)
    assert torch.equal(values(module.net), by_hand(12)) is not again


def set_lam(options: Any) -> Any:
    options["optimizer"].lam = 1.5
    return options


# ----------------------------------------------------------------------------------- accelerate


def accelerated(
    folder: Path, steps: range, path: PathOptions, load: bool = False, save: bool = False
) -> tuple[Tensor, Any]:
    """Train with accelerate, two batches a step, on the batches ``steps``."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # left over from a Trainer of an earlier test
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    optimizer = adamw(model, path)
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    if load:
        accelerator.load_state(str(folder))
    for step in steps:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, step))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    if save:
        accelerator.save_state(str(folder))
    return values(model), optimizer


def test_accelerate_trains_as_a_plain_loop(tmp_path: Path, every_path: PathOptions) -> None:
    """After prepare, with accumulation and a scheduler, the weights are those of the plain loop."""
    trained, optimizer = accelerated(tmp_path, range(6), every_path)

    assert torch.equal(trained, by_hand(6, 2, every_path))
    assert inner(optimizer).base_optimizer.param_groups[0]["lr"] == 0.05 * 0.9**3


def test_accelerate_saves_and_loads(tmp_path: Path, every_path: PathOptions) -> None:
    """With `save_state` and `load_state` after four of six batches, the weights are those of the plain loop."""
    accelerated(tmp_path, range(4), every_path, save=True)
    resumed, _ = accelerated(tmp_path, range(4, 6), every_path, load=True)

    assert torch.equal(resumed, by_hand(6, 2, every_path))


# ------------------------------------------------------------- torch_optimizer, pytorch_optimizer


@pytest.mark.parametrize(("library", "name"), [("torch_optimizer", "Yogi"), ("pytorch_optimizer", "AdaBelief")])
def test_optimizers_of_other_libraries_in_one_line(library: str, name: str) -> None:
    """An optimizer of another library is wrapped like one of torch, and its checkpoint format stays the same."""
    cls = getattr(pytest.importorskip(library), name)
    models = net(), net()
    wrapped = CautiousDecay(cls(models[0].parameters(), lr=0.01, weight_decay=0.5))
    plain = cls(models[1].parameters(), lr=0.01, weight_decay=0.5)
    for model, optimizer in zip(models, (wrapped, plain), strict=True):
        train(model, optimizer, range(3))

    assert not torch.equal(values(models[0]), values(models[1]))
    plain.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    assert same(wrapped.state_dict(), plain.state_dict())


def test_pytorch_optimizers_factory() -> None:
    """`create_optimizer` builds the groups, and the wrapper takes lam from them."""
    library = pytest.importorskip("pytorch_optimizer")
    optimizer = CautiousDecay(library.create_optimizer(net(), "adamw", lr=0.01, weight_decay=0.5))

    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.5]


# ---------------------------------------------------------------------------------------- Hydra


def test_hydra_builds_it_from_dotted_names() -> None:
    """`_target_: cwd_wrap.CautiousDecay` around `_target_: torch.optim.AdamW`, the parameters given at the call."""
    pytest.importorskip("hydra")
    from hydra.utils import instantiate

    base = {"_target_": "torch.optim.AdamW", "lr": 0.01, "weight_decay": 0.5}
    config = {"_target_": "cwd_wrap.CautiousDecay", "base_optimizer": base, "strict": True}
    optimizer = instantiate(config, base_optimizer={"params": list(net().parameters())})

    assert type(optimizer) is CautiousDecay
    assert type(optimizer.base_optimizer) is AdamW
    assert optimizer.strict
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_hydra_builds_the_class() -> None:
    """Hydra finds `.over` and its base class by dotted names."""
    pytest.importorskip("hydra")
    from hydra.utils import instantiate

    over = {
        "_target_": "cwd_wrap.CautiousDecay.over",
        "base_class": {"_target_": "hydra.utils.get_class", "path": "torch.optim.SGD"},
    }
    cls = instantiate(over)

    assert cls is CautiousDecay.over(torch.optim.SGD)


# ------------------------------------------------------------------------------------- examples

EXAMPLES = {
    "with_trainer.py": ("transformers", "'train_loss'"),
    "with_lightning.py": ("lightning", "Epoch 9/9"),
    "with_lightning.py fit --config examples/with_lightning.yaml": ("jsonargparse", "Epoch 1/1"),
    "with_accelerate.py": ("accelerate", "epoch 4: loss"),
    "with_hydra.py optimizer.strict=true steps=5": ("hydra", "CautiousDecayAdamW(AdamW, lam=0.1"),
    "with_timm.py --epochs 1 --seeds 1 --warmup-epochs 0 --output {tmp}": ("timm", "difference: "),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", EXAMPLES)
def test_examples_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each example under examples/ runs without error and prints its result."""
    library, expected = EXAMPLES[command]
    script, *argv = command.format(tmp=tmp_path).split()
    for name in {library, {"with_timm.py": "sklearn"}.get(script, "torch")}:
        pytest.importorskip(name)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"examples/{script}", *argv])
    runpy.run_path(f"examples/{script}", run_name="__main__")
    written = capfd.readouterr()

    assert expected in written.out + written.err

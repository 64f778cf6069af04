"""The examples of LoRA, a GAN, Fabric and the notebook run, and what they say of curvature is so."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from examples import fabric_loop, gan
from examples.digits import DigitsData
from lightning_thor import ThorCallback
from tests.helpers.boring import assert_bitwise, callback_of, quiet
from tests.helpers.launching import run_forked

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_gan_comes_nearer_to_the_digits_and_draws(tmp_path: Path) -> None:
    before, after = gan.main(["--epochs=2", f"--out={tmp_path}"])
    assert after < before
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_generators_loss_is_no_statistic_of_the_discriminator(tmp_path: Path) -> None:
    """Two kinds of pairs would be counted in each layer; the penalty's pass is none."""

    class Look(L.Callback):
        def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            generator, discriminator = callback_of(trainer).curvatures
            assert (generator.step, discriminator.step) == (2, 2)
            assert generator.left_out == discriminator.left_out == {}
            assert discriminator.factors.updates.tolist() == [2] * 3
            before = copy.deepcopy(discriminator.factors.flat_sums)
            optimizers = module.optimizers()
            module.toggle_optimizer(optimizers[0])
            gan.F.softplus(-module.discriminator(module(module.noise(32)))).mean().backward()
            assert_bitwise(discriminator.factors.flat_sums, before)
            module.untoggle_optimizer(optimizers[0])
            gan.F.softplus(-module.discriminator(torch.rand(32, 64))).mean().backward()
            assert not torch.equal(discriminator.factors.flat_sums, before)
            looked.append(True)

    looked: list[bool] = []
    fit = quiet(tmp_path, ThorCallback(summary=False), Look(), max_steps=4)
    fit.fit(gan.GAN(width=8), datamodule=DigitsData(batch_size=32))
    assert looked


def test_the_distance_of_two_normal_distributions_is_frechets() -> None:
    """Of one dimension: (μ₁ - μ₂)² + (σ₁ - σ₂)²."""
    x = torch.randn(100, 3, dtype=torch.float64)
    assert gan.distance(x, x) == pytest.approx(0.0, abs=1e-9)
    y = 2.0 * x + 1.0
    expected = (x.mean(0) + 1.0).square().sum() + x.var(0).sum()
    assert gan.distance(x, y) == pytest.approx(float(expected))


def test_the_fabric_loop_learns_and_goes_on_from_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--out={tmp_path}", "--accumulate=2"]
    fabric_loop.main(["--epochs=1", *arguments])
    accuracy = fabric_loop.main(["--epochs=2", *arguments])
    assert accuracy > 0.8
    printed = capsys.readouterr().out
    assert printed.count("epoch 1:") == printed.count("epoch 2:") == 1


@pytest.mark.slow
def test_lora_trains_the_adapter_alone_all_of_it_with_curvature(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install '.[finetuning]'")
    from examples import lora_finetuning

    losses = lora_finetuning.main(["--steps=10", f"--out={tmp_path}"])
    assert losses["after"] < losses["before"]
    assert "28 layers preconditioned, 100 % of the weights" in capsys.readouterr().out
    assert (tmp_path / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="fewer than 20 windows of 64"):
        lora_finetuning.windows([1, 2, 3], 64)


def test_lora_takes_a_model_of_a_folder(tmp_path: Path) -> None:
    """Its weights stay, and the adapter is read back by peft."""
    pytest.importorskip("peft", reason="peft is not installed: pip install '.[finetuning]'")
    from peft import PeftModel, get_peft_model
    from transformers import LlamaForCausalLM

    from examples import lora_finetuning

    model, _ = lora_finetuning.load(None)
    frozen = {name: p.clone() for name, p in model.state_dict().items()}
    config = lora_finetuning.LoraConfig(r=2, target_modules="all-linear")
    module = lora_finetuning.FineTuning(get_peft_model(model, config))
    loader = torch.utils.data.DataLoader(torch.randint(256, (8, 16)), batch_size=4)  # type: ignore[arg-type]
    quiet(tmp_path, lora_finetuning.ThorCallback(summary=False), max_epochs=1).fit(module, loader)
    module.model.save_pretrained(str(tmp_path))
    fresh = LlamaForCausalLM(model.config)
    fresh.load_state_dict(frozen)
    read = PeftModel.from_pretrained(fresh, str(tmp_path))
    tokens = torch.randint(256, (2, 16))
    torch.testing.assert_close(read(tokens).logits, module.model.eval()(tokens).logits)


NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"


def run_cells() -> None:
    """Run the notebook's cells in IPython, without a kernel, which would import everything once more."""
    import matplotlib
    import nbformat
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    matplotlib.use("agg")
    shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source).raise_error()


def in_ipython(notebook: Any) -> str:
    status, printed = run_forked(run_cells, COLUMNS="160")
    assert status == 0, printed[-3000:]
    return printed


def in_a_kernel(notebook: Any) -> str:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install '.[dev]'")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("run", [in_ipython, pytest.param(in_a_kernel, marks=pytest.mark.long)])
def test_the_notebook_runs_from_its_first_cell_to_its_last(run: Callable[[Any], str]) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: pip install '.[dev]'")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # kept without what it printed
    printed = run(notebook)
    words = " ".join(re.sub(r"\x1b\[[\d;]*m", "", printed).split())  # without colours and line breaks
    assert "4 layers preconditioned, 99 % of the weights" in words
    (share,) = re.findall(r"([\d.]+)% of 397 held-out images", printed)
    assert float(share) > 90.0

"""The exported generator gives the numbers of the module, for batch sizes other than the traced one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastgan.errors import InputError
from fastgan.export import export_generator


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 6)
        self.net = nn.Sequential(nn.Linear(14, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5), nn.Tanh())

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([z, self.embed(labels)], 1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (8, 1, 1)), nn.ConvTranspose2d(8, 6, 4), nn.BatchNorm2d(6), nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


def trained(module: nn.Module, n_classes: int) -> nn.Module:
    """Running statistics that differ from a batch's, so that evaluation mode shows; left in training mode."""
    for _ in range(3):
        module(*inputs(16, n_classes))
    return module.train()


def inputs(n: int, n_classes: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    z = torch.randn(n, 8, generator=g)
    return (z, torch.randint(n_classes, (n,), generator=g)) if n_classes else (z,)


MODELS = pytest.mark.parametrize(("make", "n_classes"), [(convolutional, 0), (Conditional, 4)])


@MODELS
@pytest.mark.parametrize("ending", [".onnx", ".pt2", ".safetensors"])
def test_equals_the_module(tmp_path: Path, capfd: pytest.CaptureFixture, make, n_classes: int, ending: str) -> None:
    generator = trained(make(), n_classes)
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    path = tmp_path / f"g{ending}"
    assert export_generator(generator, 8, path, n_classes=n_classes) == path
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert "".join(capfd.readouterr()) == ""
    assert generator.training
    assert all(torch.equal(v, before[k]) for k, v in generator.state_dict().items())

    generator.eval()
    if ending == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        assert names == ["latent", "label"][: len(names)]

        def run(*args: torch.Tensor) -> torch.Tensor:
            fed = dict(zip(names, (a.numpy() for a in args), strict=True))
            return torch.from_numpy(session.run(["sample"], fed)[0])
    elif ending == ".pt2":
        run = torch.export.load(path).module()
    else:
        import safetensors.torch

        run = make().eval()
        run.load_state_dict(safetensors.torch.load_file(path))
    for n in (1, 2, 7):
        args = inputs(n, n_classes)
        torch.testing.assert_close(run(*args), generator(*args), rtol=1e-5, atol=1e-6)


def test_format_overrides_the_ending_and_double_stays_double(tmp_path: Path) -> None:
    path = export_generator(nn.Linear(3, 2).double(), 3, tmp_path / "g.bin", format="torch")
    out = torch.export.load(path).module()(torch.zeros(4, 3, dtype=torch.float64))
    assert out.dtype == torch.float64


def branches_on_values() -> nn.Module:
    class Branch(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z if z.sum() > 0 else -z

    return Branch()


def test_errors_are_one_line_and_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    linear = nn.Linear(3, 2)
    for module, name, kwargs, message in (
        (linear, "g.txt", {}, "unknown file ending '.txt', expected .onnx, .pt2, .safetensors"),
        (linear, "g.pt2", {"format": "onxx"}, "unknown export format 'onxx'; did you mean 'onnx'"),
        (linear, "g.onnx", {}, "needs the package onnxscript, which is missing: pip install 'fastgan[onnx]'"),
        (linear, "missing/g.pt2", {}, "cannot write the generator: No such file"),
        (linear, "file/g.safetensors", {}, "cannot write the generator: Not a directory"),
        (branches_on_values(), "g.pt2", {}, "the generator Branch cannot be exported: "),
    ):
        with pytest.raises(InputError) as e:
            export_generator(module, 3, tmp_path / name, **kwargs)
        assert message in str(e.value)
        assert "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]

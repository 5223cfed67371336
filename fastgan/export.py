"""The trained generator alone, for programs that do not have fastgan: ONNX, ``torch.export``, or a plain state dict."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import safetensors.torch
import torch
from torch import nn

from fastgan.errors import InputError, unknown

Format = Literal["onnx", "torch", "state"]
ENDINGS: dict[str, Format] = {".onnx": "onnx", ".pt2": "torch", ".safetensors": "state"}


def export_generator(
    generator: nn.Module, latent_size: int, path: str | Path, *, n_classes: int = 0, format: Format | None = None
) -> Path:
    """Write a generator in evaluation mode for other programs to run.

    Args:
        generator: maps latents ``[B, latent_size]`` (if conditional, with labels ``[B]`` int64) to samples; unchanged.
        latent_size: columns of the latent.
        path: the file; replaced whole or not at all.
        n_classes: the generator takes labels in ``[0, n_classes)`` as its second argument; 0 for none.
        format: ``"onnx"`` (inputs ``latent`` and ``label``, output ``sample``, any batch size; needs the packages of
            ``fastgan[onnx]``), ``"torch"`` (a program for ``torch.export.load``, any batch size) or ``"state"`` (a
            state dict in safetensors); ``None`` goes by the file's ending: ``.onnx``, ``.pt2``, ``.safetensors``.

    Returns:
        ``path``. The numbers are those of the module in evaluation mode, in its own dtype, on the CPU.

    Raises:
        InputError: the ending or format is unknown, a package is missing, the generator cannot be traced, or the
            file cannot be written.
    """
    path = Path(path)
    if format is None:
        if path.suffix.lower() not in ENDINGS:
            raise InputError(f"{path}: unknown file ending {path.suffix!r}, expected {', '.join(ENDINGS)}")
        format = ENDINGS[path.suffix.lower()]
    elif format not in get_args(Format):
        raise unknown("export format", format, get_args(Format))
    module = copy.deepcopy(generator).cpu().eval().requires_grad_(False)
    if format == "state":
        state = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in module.state_dict().items()}
        data = safetensors.torch.save(state)
    elif format == "onnx":
        data = _onnx(module, latent_size, n_classes)
    else:
        buffer = io.BytesIO()
        with _quiet():
            torch.export.save(_trace(module, latent_size, n_classes), buffer)
        data = buffer.getvalue()
    new = path.with_name(f".{path.name}.unfinished")
    try:
        new.write_bytes(data)
        os.replace(new, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            new.unlink()
        raise InputError(f"{path}: cannot write the generator: {e.strerror or e}") from e
    return path


def _trace(module: nn.Module, latent_size: int, n_classes: int) -> torch.export.ExportedProgram:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    args: tuple[torch.Tensor, ...] = (torch.zeros(3, latent_size, dtype=dtype),)
    if n_classes:
        args += (torch.zeros(3, dtype=torch.int64),)
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet():
            return torch.export.export(module, args, dynamic_shapes=tuple({0: batch} for _ in args))
    except Exception as e:  # torch.export raises many kinds
        reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise InputError(f"the generator {type(module).__name__} cannot be exported: {reason}") from e


def _onnx(module: nn.Module, latent_size: int, n_classes: int) -> bytes:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise InputError(f"ONNX needs the package {e.name}, which is missing: pip install 'fastgan[onnx]'") from e
    program = _trace(module, latent_size, n_classes)
    names = ["latent", "label"] if n_classes else ["latent"]
    with _quiet():
        made = torch.onnx.export(program, dynamo=True, input_names=names, output_names=["sample"], verbose=False)
    assert made is not None  # it is where no file is named
    data: bytes = made.model_proto.SerializeToString()
    return data


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress lines, log records and warnings about themselves."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)

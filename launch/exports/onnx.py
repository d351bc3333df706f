"""A model as an ONNX file, for runtimes other than PyTorch's."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedseg.reporting import ReportingError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "images", "answers"


def check_onnx() -> None:
    """Refuse before the work what cannot be written here.

    Raises:
        ReportingError: a package is missing.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ReportingError(f'--onnx needs {", ".join(missing)}; pip install -e ".[onnx]"')


def write_onnx(deployed: nn.Module, example: Tensor, path: Path) -> None:
    """Write a program that takes any number of images at once.

    Args:
        deployed: from images to answers, (B, C, ...) -> (B, R, ...).
        example: images of the right size.
        path: of the file.

    Raises:
        ReportingError: the network holds something that ONNX has no word for.
    """
    any_number = ({0: torch.export.Dim("batch")},)
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "dynamic_shapes": any_number}
    try:
        with _silent():
            program: Any = torch.onnx.export(deployed, (example,), dynamo=True, verbose=False, **names)
            program.save(path)
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error.__cause__ or error
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise ReportingError(f"{path.stem} cannot be written as ONNX ({reason}); export without --onnx") from error


def answers(path: Path, images: Tensor) -> Tensor:
    """What the file answers in ONNX Runtime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the exporter's own reports, which speak of its inside."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

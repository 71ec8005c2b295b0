"""torchvision and timm for the tests, with the schemas that torchvision's compiled part would define.

Neither has a CPU build for every torch. Their Python part needs only two operator schemas to import; where the
real packages import as they are, nothing is added. Not installed: the tests are skipped and say so.
"""

import importlib
import importlib.util

import pytest
import torch

MISSING = [name for name in ("torchvision", "timm") if importlib.util.find_spec(name) is None]
needs_real_models = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
_libraries = []  # a library's definitions live as long as it does


def _with_schemas() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


def _import(name: str):
    try:
        return importlib.import_module(name)
    except RuntimeError as error:  # torchvision registers a fake kernel for an operator that nobody defined
        if "nms" not in str(error):
            raise
    _with_schemas()
    return importlib.import_module(name)


def torchvision_model(name: str, **options) -> torch.nn.Module:
    """A torchvision model with random weights."""
    return getattr(_import("torchvision").models, name)(weights=None, **options)


def timm_model(name: str, **options) -> torch.nn.Module:
    """A timm model with random weights."""
    _import("torchvision")
    return _import("timm").create_model(name, pretrained=False, **options)


def on_meta(build, name: str) -> torch.nn.Module:
    """A model without values, for those that are too large to fill in a test."""
    with torch.device("meta"):
        return build(name)

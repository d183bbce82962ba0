"""torchvision can be imported beside a torch that its operators do not fit."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

NEEDED = ("torch", "torchvision", "segment_anything", "transformers")
# not importorskip: to import them as they are is what may fail
pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, NEEDED)), reason=f"needs {', '.join(NEEDED)}; scripts/test.sh installs them"
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


CALL = "from glesam_ros.models.glesam import torchvision_ops as ops; " + 2 * "ops.allow_import_without_operators(); "


def test_upstream_packages_can_be_imported() -> None:
    assert run(CALL + "import segment_anything, transformers; print('there')") == "there"


def test_what_is_not_installed_stays_so() -> None:
    hide = "import sys; sys.modules['torchvision'] = None; "
    assert run(hide + CALL + "print(sys.modules['torchvision'])") == "None"


def test_a_missing_operator_raises_when_called() -> None:
    code = (
        CALL + "import torch, torchvision\n"
        "boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]])\n"
        "try: print(torchvision.ops.nms(boxes, torch.ones(2), 0.5).tolist())\n"
        "except RuntimeError: print('raised')"
    )
    assert run(code) in ("[0]", "raised")

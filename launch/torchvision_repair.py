"""Lets PyPI's torchvision be imported beside a CPU-only torch.

PyPI's torchvision is built against CUDA. Beside a CPU-only torch its compiled part cannot load, and its import dies
("operator torchvision::nms does not exist") because two operator schemas were to come from there. open_clip, timm and
even the ``accelerate`` command import torchvision. ``shapeloom doctor --repair`` copies this file into the virtual
environment's site-packages together with a one-line ``.pth`` file that imports it in every Python process there.

It waits for the import of torchvision and then declares the two schemas, if torchvision's own compiled part cannot.
It does nothing in a process that never imports torchvision, and nothing where torchvision is whole. The operators
themselves (non-maximum suppression) stay without an implementation; nothing of shapeloom uses them.

Self-contained, standard library only: a copy of it runs outside the package.
"""

import importlib.abc
import importlib.util
import os
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list = []  # a library's declarations last as long as the object


class _WaitForTorchvision(importlib.abc.MetaPathFinder):
    """Declares the missing operators just before torchvision's own code runs."""

    searching = False

    def find_spec(self, fullname, path, target=None):
        if fullname != "torchvision" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None and spec.origin:
            run, folder = spec.loader.exec_module, os.path.dirname(spec.origin)

            def exec_module(module):
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                declare_missing(folder)
                run(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def declare_missing(folder):
    """Declare the operators unless torchvision's compiled part, in `folder`, loads. Returns whether it did so."""
    try:
        import torch
    except Exception:  # torchvision's own import will say what is wrong
        return False
    try:
        if _compiled_part_loads(torch, folder) or hasattr(torch.ops.torchvision, "nms"):
            return False
        library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            library.define(schema)
    except Exception as error:
        print(f"shapeloom's torchvision repair did not work: {error}", file=sys.stderr)
        return False
    _kept.append(library)
    return True


def _compiled_part_loads(torch, folder):
    """Loading it twice is harmless: torchvision does the same again a moment later."""
    for name in sorted(os.listdir(folder)):
        if name.startswith("_C.") and name.endswith((".so", ".pyd", ".dylib")):
            try:
                torch.ops.load_library(os.path.join(folder, name))
            except OSError:
                return False
            return True
    return False


def install():
    """Wait for torchvision, once per process."""
    if not any(type(finder).__name__ == _WaitForTorchvision.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForTorchvision())

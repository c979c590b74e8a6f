"""Runs at the start of every Python process that has this folder on PYTHONPATH: lets torchvision be imported on CPU.

Why: the torchvision wheel of the package index is built against CUDA. Next to a CPU build of torch its extension does
not load, so the operators `torchvision::nms` and `qnms` do not exist, and `torchvision/_meta_registrations.py` raises
`operator torchvision::nms does not exist`. transformers and SGLang both import torchvision for image processing, of
which these operators are no part. When a torchvision whose extension loads is installed, nothing is declared.
Can go when: torchvision guards its `register_fake` calls, or a CPU wheel is what the plain name installs.
"""

import importlib.machinery
import importlib.util
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_keep = []  # a torch.library.Library withdraws its schemas when collected


class _TorchvisionSchemas:
    """Meta-path entry that finds nothing: it only notices when torchvision has tried to load its extension."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        # torchvision/__init__ imports .extension first and these two next: the earliest moment at which it is known
        # whether the extension loaded.
        if name in ("torchvision._autograd_registrations", "torchvision._meta_registrations"):
            sys.meta_path.remove(cls)
            cls._declare()
        return None

    @staticmethod
    def _declare():
        import torch

        extension = sys.modules.get("torchvision.extension")
        if extension is not None and extension._has_ops():
            return
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
                library.define(schema)
        _keep.append(library)


def _run_shadowed_sitecustomize():
    """Run the sitecustomize that this one hides (a distribution's or the user's own), if there is one."""
    others = [p for p in sys.path if os.path.abspath(p or ".") != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


sys.meta_path.insert(0, _TorchvisionSchemas)
if __name__ == "sitecustomize":  # not when sglang_macs.cpu_compat.allow_torchvision() runs this file
    _run_shadowed_sitecustomize()

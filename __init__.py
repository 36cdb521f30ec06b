"""Shapeloom: train and sample text- and image-conditioned diffusion models of 3D assets.

The public names are loaded when first used, so that ``import shapeloom`` costs nothing::

    import shapeloom

    pipeline = shapeloom.load("runs/quickstart/pipeline")
    mesh = pipeline(text=["a red cube"], seeds=[0]).meshes[0]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .diffusers_hook import teach
from .errors import UserError

if TYPE_CHECKING:
    from .checkpoints.pipeline import load
    from .models.autoencoder import Autoencoder
    from .models.cameras import Cameras
    from .models.conditioner import Conditioner
    from .models.decoder import ImplicitField
    from .models.denoiser import Denoiser
    from .models.pipeline import ShapeloomPipeline
    from .models.transformers_clip import TransformersConditioner

__version__ = "0.1.0"

__all__ = [
    "Autoencoder",
    "Cameras",
    "Conditioner",
    "Denoiser",
    "ImplicitField",
    "ShapeloomPipeline",
    "TransformersConditioner",
    "UserError",
    "__version__",
    "load",
]

_HOMES = {
    "Autoencoder": ".models.autoencoder",
    "Cameras": ".models.cameras",
    "Conditioner": ".models.conditioner",
    "Denoiser": ".models.denoiser",
    "ImplicitField": ".models.decoder",
    "ShapeloomPipeline": ".models.pipeline",
    "TransformersConditioner": ".models.transformers_clip",
    "load": ".checkpoints.pipeline",
    # diffusers looks the base class of a component up in the component's own library.
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shapeloom' has no attribute '{name}'")
    home = _HOMES[name]
    value = getattr(import_module(home, __name__) if home.startswith(".") else import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


teach("diffusers", "ShapeloomPipeline", lambda: __getattr__("ShapeloomPipeline"))

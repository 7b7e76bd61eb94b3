"""Parts of ``transformers`` on fused kernels."""

from patchpack.integrations.transformers._image_processor import ImageProcessor

__all__ = ["ImageProcessor"]

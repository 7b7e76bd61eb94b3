"""``patchpack`` in the models of transformers, 5.9 to 5.24: ``apply_to`` and ``collate``."""

from patchpack.integrations.transformers._apply import OPS, apply_to
from patchpack.integrations.transformers._collate import Batch, collate
from patchpack.integrations.transformers._image_processor import ImageProcessor
from patchpack.integrations.transformers._report import Edit, Left, Report

__all__ = ["OPS", "Batch", "Edit", "ImageProcessor", "Left", "Report", "apply_to", "collate"]

"""Models made of patchpack ops."""

from patchpack.models.native_vit import NativeViT, NativeViTConfig

__all__ = ["NativeViT", "NativeViTConfig"]

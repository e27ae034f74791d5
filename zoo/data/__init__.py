"""Data: images now, thin over `datasets`, torchvision and `timm.data`."""

from zoo.data.images import AugmentConfig, DataConfig, ImageDataset, ImageSplit, load_split

__all__ = ["AugmentConfig", "DataConfig", "ImageDataset", "ImageSplit", "load_split"]

"""Augmentations of pixels. Each is a module with its option and its class; here they are registered.

An option is a frozen dataclass of one field, with a method `augmentation` that makes the augmentation, or None where
the option is not given. `AugmentationConfig` is derived from all of them.
"""

from pipelines.augmentations.color_jitter import ColorJitterOption
from pipelines.augmentations.lighting import LightingOption
from pipelines.augmentations.rand_augment import RandAugmentOption
from pipelines.augmentations.random_erasing import RandomErasingOption
from pipelines.augmentations.trivial_augment import TrivialAugmentOption

# In the order in which they are carried out
OPTIONS = (
    RandAugmentOption,
    TrivialAugmentOption,
    ColorJitterOption,
    LightingOption,
    RandomErasingOption,
)

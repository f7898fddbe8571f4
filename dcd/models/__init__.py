"""The networks: one body each, static or dynamic by the layers that it is given."""

from dcd.models import mobilenet_v2, resnet

__all__ = ["mobilenet_v2", "resnet"]

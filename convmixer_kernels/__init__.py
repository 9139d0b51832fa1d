# SPDX-License-Identifier: MIT
"""Fused kernels for large-kernel depthwise convolution networks, above all ConvMixer's two blocks."""

import pkgutil

# In a source checkout this folder hides the installed package, but only that has the native modules: look there too.
__path__ = pkgutil.extend_path(__path__, __name__)

from ._flops import register_when_imported as _register_flops
from ._version import __version__
from .dispatch import available_backends, use_backend
from .functional import depthwise_block, depthwise_conv2d, mixer_layer, pointwise_block
from .info import build_info
from .modules import DepthwiseBlock, DepthwiseConv2d, PointwiseBlock

__all__ = [
    "DepthwiseBlock",
    "DepthwiseConv2d",
    "PointwiseBlock",
    "__version__",
    "available_backends",
    "build_info",
    "depthwise_block",
    "depthwise_conv2d",
    "mixer_layer",
    "pointwise_block",
    "use_backend",
]

_register_flops()

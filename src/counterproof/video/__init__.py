"""Moments, frames and exposure over time."""

from counterproof.errors import require
from counterproof.exports import lazy_exports

require("video", "torch")
__getattr__, __dir__ = lazy_exports(__name__, __file__)

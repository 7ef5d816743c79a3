"""Keeping models harmless, controllable and honest."""

from counterproof.errors import require
from counterproof.exports import lazy_exports

require("safety", "torch", "transformers")
__getattr__, __dir__ = lazy_exports(__name__, __file__)

"""Aligning language models with preferences."""

from counterproof.errors import require
from counterproof.exports import lazy_exports

require("preference", "torch", "transformers", "peft")
__getattr__, __dir__ = lazy_exports(__name__, __file__)

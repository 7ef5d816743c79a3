"""What to show next."""

from counterproof.errors import require
from counterproof.exports import lazy_exports

require("recommendation", "torch", "transformers")
__getattr__, __dir__ = lazy_exports(__name__, __file__)

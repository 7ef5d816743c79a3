"""What networks learn, and how it is aligned, distilled or adapted."""

from counterproof.errors import require
from counterproof.exports import lazy_exports

require("representation", "torch", "sklearn")
__getattr__, __dir__ = lazy_exports(__name__, __file__)

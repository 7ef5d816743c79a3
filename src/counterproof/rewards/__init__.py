"""Learning, combining and using reward functions."""

from counterproof.errors import require
from counterproof.exports import lazy_exports

require("rewards", "torch")
__getattr__, __dir__ = lazy_exports(__name__, __file__)

"""Who is better: judges, arenas, grades."""

from counterproof.errors import require
from counterproof.exports import lazy_exports

require("judging", "sklearn")
__getattr__, __dir__ = lazy_exports(__name__, __file__)

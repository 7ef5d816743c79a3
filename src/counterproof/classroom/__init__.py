"""Teaching people and machines."""

from counterproof.errors import require
from counterproof.exports import lazy_exports

require("classroom", "sklearn")
__getattr__, __dir__ = lazy_exports(__name__, __file__)

"""Making pictures: diffusion, flows, editing."""

from counterproof.errors import require
from counterproof.exports import lazy_exports

require("generation", "torch", "diffusers", "PIL", "sklearn")
__getattr__, __dir__ = lazy_exports(__name__, __file__)

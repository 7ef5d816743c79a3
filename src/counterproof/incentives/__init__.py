"""Mechanisms, agents, fairness."""

from counterproof.errors import require
from counterproof.exports import lazy_exports

require("incentives", "sklearn")
__getattr__, __dir__ = lazy_exports(__name__, __file__)

"""The page: its catalogue of papers, search, and report."""

from counterproof.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)

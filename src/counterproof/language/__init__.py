"""What several rooms need of a language model: load, score, generate, chat."""

from counterproof.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)

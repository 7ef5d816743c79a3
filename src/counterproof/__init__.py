"""Research papers that run: their methods as components, their claims as honest comparisons."""

__version__ = "0.1.0"

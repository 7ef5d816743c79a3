"""Research papers that run: their methods as components, their claims as honest comparisons."""

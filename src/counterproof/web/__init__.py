"""The page, served: HTML, feeds, a JSON interface, and tools for assistants."""

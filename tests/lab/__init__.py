"""A small laboratory for the tests of the bench: a task that takes no time, and methods that misbehave."""

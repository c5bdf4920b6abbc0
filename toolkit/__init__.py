"""Train a large image classifier, distil it into a small one, prove it, export it and serve it."""

__version__ = "0.1.0"

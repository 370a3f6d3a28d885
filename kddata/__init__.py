"""kddata: label once, distil many. See README.md; the public names arrive lazily, with the modules that hold them."""

__version__ = "0.1.0"

"""The inspection daemon: frames in, exactly one verdict a part out."""

__version__ = "0.1.0"

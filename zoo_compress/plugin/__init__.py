"""The library as a plugin of timm. Importing it registers its names."""

from .hub import load, save
from .registry import register_all
from .remote import install

__all__ = ["load", "save"]

register_all()
install()

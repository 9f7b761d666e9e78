"""oscar_radix: a radix prefix cache whose pages are stored in 2 bits."""

__version__ = "0.1.0"

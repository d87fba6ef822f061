"""Chat with, fine-tune and serve vision-language models: natively, offline, and with the same code in all three.

Importing it makes transformers' Auto classes know the models of this package, once transformers is imported.
"""

from mmtool import auto

__version__ = "0.1.0"

auto.install()

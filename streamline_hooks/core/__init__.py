"""Errors, configs, batches, devices, hashing, files, distributed runs, progress bars and tables.

This sub-package imports no other sub-package and contains nothing specific to transformer blocks.
"""

import lazy_loader

# The names are listed in ``__init__.pyi`` and imported on first use, so that ``--help`` does not import torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Make trained neural networks smaller without retraining them.

The contents page is ``__init__.pyi``. Names are imported on first use: solvers on correlation matrices need
NumPy and SciPy, what works on networks needs torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Training only the weights that a mask names: every other element stays bit-identical.

::

    from ckdiff.training import SubnetworkOptimizer, freeze_unmasked

    freeze = freeze_unmasked(model, optimizer, "run1.zarr")            # any torch optimizer
    optimizer = SubnetworkOptimizer(torch.optim.AdamW, model, "run1.zarr", lr=1e-5)  # small state

For plain torch in one process. Importing this imports torch; ``import ckdiff`` does not.
"""

from __future__ import annotations

from ckdiff.errors import UsageError

try:
    import torch as _torch  # noqa: F401  # said in one place, before the modules that need it
except ImportError:
    raise UsageError("ckdiff.training needs torch", hint="pip install 'ckdiff[train]'") from None

from ckdiff.training.compact import SubnetworkOptimizer
from ckdiff.training.freezing import Freeze, freeze_unmasked
from ckdiff.training.names import parameter_masks

__all__ = ["Freeze", "SubnetworkOptimizer", "freeze_unmasked", "parameter_masks"]

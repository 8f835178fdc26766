"""Where tensors come from, behind the protocol in ``protocol.py``; ``opening.py`` opens them."""

from ckdiff.checkpoints.opening import open_checkpoint
from ckdiff.checkpoints.protocol import Checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]

"""Foreign checkpoints to network folders, without the programs that wrote them."""

from checkpoints_convert.conversion import FAMILIES, convert
from checkpoints_convert.errors import CheckpointError

__all__ = ["FAMILIES", "CheckpointError", "convert"]

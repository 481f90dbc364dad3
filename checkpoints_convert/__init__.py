"""Foreign checkpoints to network folders, without the programs that wrote them."""

from checkpoints_convert.conversion import convert, families
from checkpoints_convert.errors import CheckpointError

__all__ = ["CheckpointError", "convert", "families"]

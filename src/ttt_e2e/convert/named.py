"""Models that have a name, which can be given wherever a model folder can."""

from pathlib import Path

SMOLLM2 = "smollm2"


def is_name(path: Path) -> bool:
    """Whether this is the name of a model. A folder of that name comes first."""
    return str(path) == SMOLLM2 and not path.exists()


def find_model(path: Path | None, progress: bool = False) -> Path | None:
    """The folder of the model that a user names: `path` itself, or, for a name, that of an installed package's model.

    Raises UserError if the package of a name is missing.
    """
    if path is None or not is_name(path):
        return path
    from ttt_e2e.convert.smollm2 import smollm2_folder

    return smollm2_folder(progress)

"""Which files a client may have read: those in folders that the user has named."""

from collections.abc import Iterable
from pathlib import Path

from ttt_e2e.errors import UserError
from ttt_e2e.files import expand_user


class AllowedFiles:
    """The files in `folders`, wherever links lead. Raises UserError if one of these is not a folder."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = [expand_user(folder).resolve() for folder in folders]
        for folder in self._folders:
            if not folder.is_dir():
                raise UserError(f"{folder} is not a folder; name one with texts that clients may have read.")

    def find(self, name: str) -> Path:
        """The file that a client names by its path, absolute or from one of the folders.

        Raises UserError if it is missing, not a regular file, or not in any of the folders.
        """
        if not self._folders:
            raise UserError("This server reads no files; send the text itself, or start the server with --files DIR.")
        try:
            found = [path.resolve() for path in (folder / expand_user(name) for folder in self._folders)]
            inside = [path for path in found if any(path.is_relative_to(folder) for folder in self._folders)]
            file = next((path for path in inside if path.exists()), None)
        except (OSError, ValueError, RuntimeError) as error:  # too long a name, a zero byte, links in a circle
            raise UserError(f"{name[:200]!r} is not the path of a file; give another one.") from error
        if file is None and len(inside) < len(found):  # whether there is one elsewhere stays unsaid
            folders = ", ".join(map(str, self._folders))
            raise UserError(f"This server may not read {name!r}, only files in {folders}; give one of those.")
        if file is None:
            raise UserError(f"There is no file {name!r}; check the path.")
        if not file.is_file():
            raise UserError(f"{name!r} is not a regular file; give a text file.")
        return file

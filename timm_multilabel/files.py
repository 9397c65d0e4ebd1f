"""Files written whole or not at all."""
import os
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file beside its final place and rename it, so that a reader or a crash never meets half of it.

    Text is written as UTF-8, line ends as they are. The folder must exist.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    data = content.encode('utf-8') if isinstance(content, str) else content
    try:
        with open(temporary, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

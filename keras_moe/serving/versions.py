"""The versions of a model, folders 1, 2, 3, … in one folder, as model servers watch it."""

import os
import pathlib
import tempfile

from keras_moe.arguments import check_size


def check_target(path, version=None):
    """Raises ValueError unless a model can get another version, or this one."""
    if version is not None:
        check_size("version", version)
    if pathlib.Path(path, "saved_model.pb").exists():
        raise ValueError(
            "`path` must be the folder that holds a folder for each version of the model. "
            f"Received: {str(path)!r}, which is itself an exported model"
        )
    if version is not None and pathlib.Path(path, str(version)).exists():
        raise ValueError(
            "A version is never replaced, as servers may be running it. Leave `version` out for "
            f"the next one. Received: version={version}, which {str(path)!r} has"
        )


def publish(write, path, version=None):
    """Adds a version that is complete as soon as it can be seen.

    It is written into a hidden folder beside the others, which servers ignore, and then renamed.
    Whoever is killed before leaves that folder, `.unfinished-…`, and nothing else.

    Args:
        write: Function that creates and fills the folder whose path it is given.
        path: Folder of all versions, which is created where it is missing.
        version: Integer. Default: the one after the last.

    Returns:
        The path of the version.

    Raises:
        ValueError: If the version is there, or `path` is one itself.
    """
    check_target(path, version)
    os.makedirs(path, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path) as folder:
        unpublished = os.path.join(folder, "version")
        write(unpublished)
        while True:
            target = pathlib.Path(path, str(_next(path) if version is None else version))
            try:
                # Fails, in one step, where there is such a folder and something in it.
                os.rename(unpublished, target)
                return target
            except OSError:
                if not target.exists():
                    raise
                check_target(path, version)  # Else another process has been faster: try the next.


def _next(path):
    return 1 + max((int(name) for name in os.listdir(path) if name.isdecimal()), default=0)

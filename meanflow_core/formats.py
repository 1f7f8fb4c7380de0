"""Format versions of checkpoints and generators: only this release's version is read, any other is refused."""


def require_format_version(version: object, supported: int, what: str) -> None:
    """Raises ValueError if a format version is not the one that this release reads and writes.

    what: the subject of the message, for example "the checkpoint in FOLDER".
    """
    if version != supported:
        raise ValueError(
            f"{what} has format version {version}, but this release reads version {supported} only; "
            f"use the release that wrote it"
        )

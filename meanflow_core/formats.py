"""Versions of what is written to disk: what later releases write is refused, and never taken for damage."""


def require_known_format(version: object, newest: int, what: str) -> None:
    """Raises ValueError for a format version that is not one of 0 to `newest`, which this release reads.

    what: "the checkpoint in FOLDER", for the message.
    """
    if version not in range(newest + 1):
        raise ValueError(
            f"{what} has format version {version}, but this release reads versions up to {newest}; install the release "
            f"that wrote it"
        )

"""Format versions of checkpoints and generators. A release reads only the version that it writes."""

GENERATOR_FORMAT_VERSION = 3


def require_format_version(version: object, supported: int, subject: str) -> None:
    """Raises ValueError if a format version differs from the supported one.

    subject: names the data in the message, for example "the checkpoint in FOLDER".
    """
    if version != supported:
        raise ValueError(
            f"{subject} has format version {version}, but this release reads version {supported} only; "
            f"use the release that wrote it"
        )

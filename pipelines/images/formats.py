"""Names of the formats that images may be stored in."""

from typing import Literal

# Each name is a file of this folder with the same three functions (see `sources.FormatReader`).
Format = Literal["folders", "parquet", "webdataset", "idx"]

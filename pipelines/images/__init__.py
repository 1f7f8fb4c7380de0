"""Images as they come: class folders, Parquet, WebDataset; decoding and cropping."""

"""A small classifier of one data set, which judges generated images."""

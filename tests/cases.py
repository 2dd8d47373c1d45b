"""The tables of awkward cases."""

SPLITS = {"even": [4, 4], "uneven": [7, 1], "empty-rank": [8, 0], "four": [3, 1, 0, 4]}
SHAPES = {"NC": (3,), "NCL": (3, 5), "NCHW": (3, 4, 2), "NCDHW": (3, 2, 3, 2), "one-pixel": (3, 1, 1)}

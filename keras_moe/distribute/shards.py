"""How variables are made of which each replica holds a part of the rows, by the backend."""

from keras_moe.backend import NAME

if NAME == "tensorflow":
    from keras_moe.distribute.sharded_variable import over_shards, sharded_rows
else:
    from keras_moe.distribute.row_layout import over_shards, sharded_rows

__all__ = ["over_shards", "sharded_rows"]

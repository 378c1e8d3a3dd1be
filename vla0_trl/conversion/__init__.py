"""Episodes -> a chat dataset on disk: `staging` reads them, `shards` writes rows, `card` describes it.

Every converter in data_prep/ is a `Source` (see `vla0_trl.episodes`) and a call of `convert.convert`; `cli` is their
command line.
"""

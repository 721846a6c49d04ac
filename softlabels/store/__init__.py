"""The table: Parquet shards in a Delta log, versions, tags, lineage."""

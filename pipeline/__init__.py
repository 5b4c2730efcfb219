"""Everything between a URL and a Parquet file. Imports neither torch nor Ray, and nothing of model/ or jobs/."""

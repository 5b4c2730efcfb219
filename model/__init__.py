"""The dVAE: torch lives here. Imports neither Ray nor fsspec, and nothing of pipeline/ or jobs/."""

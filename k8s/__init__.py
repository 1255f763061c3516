"""Cluster jobs and the container images; `pipeline.py` runs the jobs."""

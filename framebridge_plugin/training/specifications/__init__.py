"""finetrainers model specifications, one file each."""

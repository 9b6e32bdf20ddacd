"""All surgery on finetrainers: the only folder that patches it."""

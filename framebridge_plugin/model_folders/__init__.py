"""What can be told about a model's folder without loading it; needs the standard library alone."""

"""A backbone of another package: a flow-matching text-to-video model of a few convolutions."""

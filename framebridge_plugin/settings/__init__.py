"""Every setting once: name, type, range, default and help, for recipes, command lines and classes alike; no torch."""

"""How good videos are that a model makes of images: measures, features and the command's core."""

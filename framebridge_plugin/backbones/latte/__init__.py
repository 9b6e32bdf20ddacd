"""Latte: classes in place of captions, an autoencoder of images, and a neural prior."""

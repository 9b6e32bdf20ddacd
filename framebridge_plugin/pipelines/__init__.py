"""Image-to-video pipelines in diffusers' conventions, and the conditioning that training shares with them."""

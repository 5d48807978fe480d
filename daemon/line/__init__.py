"""What speaks with the outside. Knows no image."""

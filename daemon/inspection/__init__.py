"""What happens to a frame. Knows no socket."""

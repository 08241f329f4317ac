"""zeromean."""

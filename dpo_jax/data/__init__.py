"""Text to packed token rows."""

"""Model and adapter folders in Hugging Face's format, read and written."""

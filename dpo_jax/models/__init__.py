"""Token rows to hidden states: one decoder, its sizes and its file format."""

"""Bytes on the move: the packed store, its readers, and the one streaming loop. No model code, no cluster."""

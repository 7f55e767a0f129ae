"""Parts of `benchmarks/gpu_stream.py`: the model, one script a competitor, the table."""

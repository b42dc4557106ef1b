from attention import linear_attention_chunked

__all__ = ["linear_attention_chunked"]  # its loop, and its gradient by hand, are in kernels/chunked.py

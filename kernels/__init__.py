"""The ops in Triton, one module per op or family of ops; fastadv.ops loads them as its triton backend."""

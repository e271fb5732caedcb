"""What runs in a peer's process: one module for each library, which imports that library, numpy and nothing of ours."""

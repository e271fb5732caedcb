"""What `python -m scripts.bench` can time and measure: one module per subject."""

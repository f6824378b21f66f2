"""The training loop: driver, batches, diagnostics, warm start; it knows roles, never Ray."""

"""The loop: prompts, groups in flight, batches and the driver."""
